"""KFRA: the Fisher matrix's output factors by a recursion over layers, for feed-forward chains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Factors
from gradmaker.curvature.likelihood import Terms

if TYPE_CHECKING:
    from gradmaker.layers import Call
    from gradmaker.sites import Site
    from gradmaker.step import Step

__all__ = ["FisherRecursive", "find_chain"]

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink),
    *(nn.Identity, nn.Dropout, nn.AlphaDropout, nn.Flatten),
)
"""Modules whose derivative is one number for each element; of a matrix, `nn.Flatten` is the identity."""


@dataclass(frozen=True, kw_only=True)
class FisherRecursive(Curvature):
    """The exact Fisher as ``B_l (x) A_l`` with ``B`` averaged over the batch layer by layer, without a backward pass.

    ``B_L = sum_m Lambda_m``, ``B_l = (W^T B_(l+1) W) * mean_n phi'_n phi'_n^T`` with the weight ``W`` of the next layer, and
    ``A_l = mean_n a_n a_n^T``. For one example, or without nonlinearities, this is KFLR. The model has to be an `nn.Sequential`
    of `nn.Linear` and element-wise modules: where branches meet or positions share weights, there is no such recursion.

    Reference: Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662, section 3 (KFRA).
    """

    gives: ClassVar[tuple[type[Evidence], ...]] = (Factors,)

    chunk: int = 64
    """Columns of the factor of ``Lambda`` that are formed at once: a bound on memory."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: expected an integer of at least 1")

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        terms, chain = _only(step.terms), find_chain(step.tape.root)
        sites = {m: [s for s in step.active() if m in s.modules] for _, m in chain}
        for name, module in chain:
            if not sites[module] or len(step.tape.calls[module]) != 1:
                raise ValueError(
                    f"FisherRecursive: {name} takes no part, is frozen or ignored, or is called more than once, which breaks "
                    "the chain: use FisherExact (kflr)"
                )
        calls = [step.tape.calls[m][0] for _, m in chain]
        weights = _example_weights(step, terms)
        found: dict[str, Evidence] = {}
        B = self._output_factor(terms, step.examples)
        B = B * _slope_moment(terms.z, calls[-1], weights)
        for j in range(len(chain) - 1, -1, -1):
            module = chain[j][1]
            for site in sites[module]:
                found[site.name] = _factors(site, calls[j].input, B, weights, step.statistics_dtype(site))
            if j > 0:
                W = module.weight.detach().to(B)
                B = (W.mT @ B @ W) * _slope_moment(calls[j].input, calls[j - 1], weights)
                B = (B + B.mT) / 2
        yield found

    @torch.no_grad()
    def _output_factor(self, terms: Terms, examples: int) -> Tensor:
        """``sum_m Lambda_m``.  # (C, C)"""
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
    """The linear layers of a feed-forward chain, by name, in order. ValueError that names the first module that breaks it."""
    chain = []
    for name, module in _leaves("", model):
        if type(module) is nn.Linear:
            chain.append((name, module))
        elif not isinstance(module, ELEMENTWISE):
            raise ValueError(
                f"FisherRecursive (kfra) needs an nn.Sequential of nn.Linear and element-wise modules, and "
                f"{name or 'the model'} is {type(module).__name__}: use FisherExact (kflr), which has no such limits"
            )
    return chain


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for key, child in module.named_children():
        yield from _leaves(f"{name}.{key}" if name else key, child)


def _only(terms: list[Terms]) -> Terms:
    if len(terms) != 1:
        raise ValueError(
            f"FisherRecursive needs one recognised loss, and {len(terms)} were called: use F.cross_entropy, F.nll_loss, "
            "F.mse_loss or F.binary_cross_entropy_with_logits, or set likelihood="
        )
    return terms[0]


def _example_weights(step: Step, terms: Terms) -> Tensor:
    """What a mean over examples weighs each with: those that the loss leaves out do not count.  # (n, 1)"""
    mask = step.mask(terms)
    counted = torch.ones_like(terms.omega) if mask is None else mask.reshape(-1).to(terms.omega)
    return (counted / counted.sum().clamp(min=1)).unsqueeze(1)


def _slope_moment(after: Tensor, call: Call, weights: Tensor) -> Tensor:
    """``mean_n phi'_n phi'_n^T`` of what lies between a layer's output and ``after``, element by element.  # (d, d)"""
    (slope,) = torch.autograd.grad(after, call.edges[0], torch.ones_like(after), retain_graph=True)
    slope = slope.detach().to(weights)
    moment: Tensor = slope.mT @ (slope * weights)
    return moment


def _factors(site: Site, a: Tensor, B: Tensor, weights: Tensor, dtype: torch.dtype) -> Factors:
    """``A`` with the one of the bias last, for whatever part of a layer is trained here."""
    if a.ndim != 2 or len(a) != len(weights):
        raise ValueError(
            f"FisherRecursive: {site.name} is fed {tuple(a.shape)}, not a vector an example: use FisherExact (kflr)"
        )
    parts = ([a.detach().to(weights)] if site.weighted else []) + ([torch.ones_like(weights)] if site.bias else [])
    x = torch.cat(parts, 1)
    A = x.mT @ (x * weights)
    return Factors(A.to(dtype).unsqueeze(0), B.to(dtype).unsqueeze(0))
