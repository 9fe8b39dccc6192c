"""KFRA: Kronecker factors of the Fisher matrix by a recursion over the layers of a feed-forward chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradmaker.capture.rules.calls import Call
from gradmaker.capture.sites import Site
from gradmaker.curvature.base import NO_DRAWS, NO_REDUCTION
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.products import Factors, Moments
from gradmaker.curvature.roles import OfMoments, Watching
from gradmaker.curvature.step import Step
from gradmaker.loss.terms import Terms
from gradmaker.options.checks import check_count

__all__ = ["FisherRecursive", "break_of_chain", "find_chain"]

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink),
    *(nn.Identity, nn.Dropout, nn.AlphaDropout, nn.Flatten),
)
"""Modules whose derivative is one number for each element; for a matrix `nn.Flatten` is the identity."""


@dataclass(frozen=True, kw_only=True)
class FisherRecursive(Watching, OfMoments):
    """The exact Fisher matrix as ``B_l (x) A_l``, with ``B`` averaged over the batch layer by layer, without a backward pass.

    ``B_L = sum_m Lambda_m``, ``B_l = (W^T B_(l+1) W) * mean_n phi'_n phi'_n^T`` with the weight ``W`` of the next layer, and
    ``A_l = mean_n a_n a_n^T``. For one example, or without nonlinearities, this is KFLR. The model has to be an `nn.Sequential`
    of `nn.Linear` and element-wise modules: the recursion is not defined for branches or weight sharing.

    Reference: Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662, section 3 (KFRA).
    """

    gives: ClassVar[frozenset[Kind]] = kinds(Factors)
    by_parts: ClassVar[bool] = True
    inapplicable = NO_DRAWS | NO_REDUCTION

    chunk: int = 64
    """Columns of the factor of ``Lambda`` that are formed at once: a bound on memory."""

    def __post_init__(self) -> None:
        check_count("chunk", self.chunk, 1)

    def watches(self, model: nn.Module) -> Iterable[nn.Module]:
        """All linear layers: the recursion needs frozen and ignored ones too. ValueError if the model is no chain."""
        return [module for _, module in find_chain(model)]

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        moments = self._moments(step)
        if step.share is None:
            yield self.recursion(step.tape.root, step.active(), moments)
        else:
            yield {moments.sites[0]: moments}

    def recursion(self, model: nn.Module, sites: Sequence[Site], moments: Moments) -> dict[str, Evidence]:
        of_module = _by_module(model, sites)
        chain = find_chain(model)
        lowest = next(j for j, (_, m) in enumerate(chain) if of_module[m])
        counted, B, *rest = moments.sums
        total, found = counted.clamp(min=1), dict[str, Evidence]()
        W: Tensor | None = None  # of the layer above; the lowest layer, whose inputs may be many, needs no further product
        for _, module in reversed(chain[lowest:]):
            if W is not None:
                B = W.mT @ B @ W
                B = (B + B.mT) / 2
            B = B * (rest.pop(0) / total)
            for site in of_module[module]:
                A = rest.pop(0) / total
                found[site.name] = Factors(A.unsqueeze(0), B.unsqueeze(0), counted=counted)
            W = module.weight.detach().to(B)
        return found

    def _moments(self, step: Step) -> Moments:
        """The counted examples, the output factor, and from the last layer down the moments of its derivatives and inputs."""
        terms, chain, sites = _only(step.terms), find_chain(step.tape.root), step.active()
        of_module = _by_module(step.tape.root, sites)
        lowest = next(j for j, (_, m) in enumerate(chain) if of_module[m])
        calls = [_call(step, name, module) for name, module in chain[lowest:]]
        kept = _kept(step, terms)
        sums, after = [kept.sum(), self._output_factor(terms, step.examples)], terms.z
        for (_, module), call in zip(reversed(chain), reversed(calls), strict=False):
            sums.append(_derivative_moment(after, call, kept))
            sums += [_input_moment(site, call.input, kept) for site in of_module[module]]
            after = call.input
        return Moments(tuple(s.name for s in sites), tuple(sums))

    @torch.no_grad()
    def _output_factor(self, terms: Terms, examples: int) -> Tensor:
        """``sum_m Lambda_m``. ValueError where the outputs are not one vector for each example.  # (C, C)"""
        if terms.z.ndim != 2 or len(terms.z) != examples:
            raise ValueError(
                f"FisherRecursive: the loss is a function of a tensor of shape {tuple(terms.z.shape)}, and a chain without "
                f"weight sharing gives ({examples}, C): use FisherExact (kflr)"
            )
        C = terms.z.shape[1]
        B = terms.omega.new_zeros(C, C)
        for u in terms.exact(examples, self.chunk):
            rows = u.reshape(-1, C).to(B)
            B.addmm_(rows.mT, rows)
        return B


def find_chain(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a feed-forward chain, by name, in order. ValueError where the model is no chain, with the reason."""
    if reason := break_of_chain(model):
        raise ValueError(reason)
    return [(name, module) for name, module in _leaves("", model) if isinstance(module, nn.Linear)]


def break_of_chain(model: nn.Module) -> str | None:
    """Why a model is not a chain of linear and element-wise layers, each used once; None if it is."""
    known: dict[nn.Parameter, str] = {}
    for name, module in _leaves("", model):
        named = name or "the model"
        if type(module) is not nn.Linear and not any(type(module).forward is kind.forward for kind in ELEMENTWISE):
            return (
                f"FisherRecursive (kfra) needs an nn.Sequential of nn.Linear and element-wise modules, and "
                f"{named} is {type(module).__name__}: use FisherExact (kflr), which has no such limits"
            )
        for shared in module.parameters() if isinstance(module, nn.Linear) else ():
            if known.setdefault(shared, named) != named:
                return (
                    f"FisherRecursive (kfra) needs every layer to be used once, and {known[shared]} and {named} share weights: "
                    "use FisherExact (kflr), which has no such limits"
                )
    if not known:
        return "FisherRecursive (kfra) needs an nn.Sequential with nn.Linear in it, and the model has none"
    return None


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the leaf modules in order; a module that is used several times comes several times."""
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from _leaves(f"{name}.{key}" if name else key, child)


def _call(step: Step, name: str, module: nn.Linear) -> Call:
    calls = step.tape.calls[module]
    if len(calls) != 1:
        raise ValueError(
            f"FisherRecursive: {name} is called {len(calls)} times in this pass, and the recursion needs one call of each "
            "layer: use FisherExact (kflr)"
        )
    return calls[0]


def _only(terms: list[Terms]) -> Terms:
    if len(terms) != 1:
        raise ValueError(
            f"FisherRecursive needs one recognised loss, and {len(terms)} were called: use F.cross_entropy, F.nll_loss, "
            "F.mse_loss or F.binary_cross_entropy_with_logits, or set likelihood="
        )
    return terms[0]


def _by_module(model: nn.Module, sites: Sequence[Site]) -> dict[nn.Module, list[Site]]:
    return {m: [s for s in sites if m in s.modules] for _, m in find_chain(model)}


def _kept(step: Step, terms: Terms) -> Tensor:
    """1 for the examples that the loss counts, 0 for the others.  # (n, 1)"""
    mask = step.mask(terms)
    counted = torch.ones_like(terms.omega) if mask is None else mask.reshape(-1).to(terms.omega)
    return counted.unsqueeze(1)


def _derivative_moment(after: Tensor, call: Call, kept: Tensor) -> Tensor:
    """``sum_n phi'_n phi'_n^T`` of the element-wise modules between a layer's output and ``after``.  # (d, d)"""
    (derivative,) = torch.autograd.grad(after, call.edges[0], torch.ones_like(after), retain_graph=True)
    derivative = derivative.detach().to(kept)
    moment: Tensor = derivative.mT @ (derivative * kept)
    return moment


def _input_moment(site: Site, a: Tensor, kept: Tensor) -> Tensor:
    """``sum_n a_n a_n^T`` for the parameters that are trained, the bias last. ValueError for inputs with more than one axis."""
    if a.ndim != 2 or len(a) != len(kept):
        raise ValueError(
            f"FisherRecursive: {site.name} is fed {tuple(a.shape)}, not a vector an example: use FisherExact (kflr)"
        )
    parts = ([a.detach().to(kept)] if site.weighted else []) + ([torch.ones_like(kept)] if site.bias else [])
    x = torch.cat(parts, 1)
    moment: Tensor = x.mT @ (x * kept)
    return moment
