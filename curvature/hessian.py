"""Hessian and Gauss-Newton matrix, as matrix-vector products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import prod
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradmaker.capture.sites import Site
from gradmaker.curvature.base import NO_CALLS, NO_DRAWS, NO_OUTPUTS, NO_REDUCTION, Need
from gradmaker.curvature.evidence import WHOLE, Evidence, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.fisher import FisherEmp, FisherMC
from gradmaker.curvature.layer_factors import layer_factors
from gradmaker.curvature.products import Layers, Product
from gradmaker.curvature.roles import OfProducts
from gradmaker.curvature.step import Step
from gradmaker.options.checks import check_choice, check_count
from gradmaker.passes.batches import Batch
from gradmaker.passes.graph import Graph, Vectors
from gradmaker.passes.replay import Replay
from gradmaker.passes.vectors import Layout
from gradmaker.reentrant import refuse_scripted

__all__ = [
    "GaussNewton",
    "Hessian",
    "Mode",
    "Products",
    "check_mode",
    "multiply_gauss_newton",
    "multiply_hessian",
    "second_derivatives",
]

Mode: TypeAlias = Literal["reverse", "forward", "difference"]
"""``reverse``: backward of backward; ``forward``: forward-over-reverse; ``difference``: of gradients at displaced weights."""

Multiply: TypeAlias = Callable[[Mapping[nn.Parameter, Tensor]], dict[nn.Parameter, Tensor]]
"""A vector, as a tensor for each parameter, to its product with the matrix."""

Apply: TypeAlias = Callable[[Layout, Tensor], Tensor]
"""Vectors as the rows of a matrix, laid out as sites, to their products."""

DIFFERENCE = 1 / 3
"""Power of the unit roundoff: the relative displacement at which the error of a central difference is least."""

UNSUPPORTED = (
    "not implemented",
    "does not support",
    "does not currently support",  # compiled functions, double backward
    "marked with @once_differentiable",
    "Trying to use forward AD",
    "autograd.Function",  # without setup_context, or without jvp
)
"""Parts of torch's error messages about missing second derivatives."""
ADVICE = (
    "compiled models, fused attention kernels and reentrant checkpoints have none: run the model as it was before "
    "torch.compile, inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), with "
    "checkpoint(..., use_reentrant=False)"
)


@dataclass(frozen=True, kw_only=True)
class Products(OfProducts):
    """A curvature given by its products ``v -> C v``, with all sites as one vector, and with each site alone."""

    gives: ClassVar[frozenset[Kind]] = kinds(Product)
    layerwise: ClassVar[bool] = False

    examples: int | None = None
    """Number of examples of the batch that the products use, drawn anew for every step; None uses all."""
    fresh: bool = False
    """Whether the examples are drawn anew for every product, which few solvers allow."""
    squares: bool = False
    """Whether the diagonal of the empirical Fisher matrix is measured too, from the ordinary backward pass."""
    factors: bool = False
    """Whether Kronecker factors of the Fisher matrix are measured too, at sampled targets: one more backward pass."""

    def __post_init__(self) -> None:
        if self.examples is not None:
            check_count("examples", self.examples, 1, hint=", or None for the whole batch")
        if self.fresh and self.examples is None:
            raise ValueError("fresh=True: expected examples=, the number of examples that are drawn for every product")
        if self.squares and self.factors:
            raise ValueError("squares=True, factors=True: expected at most one of them, a solver has one preconditioner")

    @property
    def inapplicable(self) -> dict[str, str]:  # type: ignore[override]
        """Options for sampling, for examples and for the likelihood have an effect with some values of the fields alone."""
        cut, measured = self.examples is not None, self.squares or self.factors
        known: dict[str, str] = ({} if measured else NO_CALLS | NO_OUTPUTS) | ({} if cut or self.squares else NO_REDUCTION)
        if cut:  # the examples are drawn along that axis
            known.pop("batch_axis", None)
        if "outputs" in self.needs:  # the likelihood is needed for losses that are not recognised
            known.pop("self_check", None)
        return known if cut or self.factors else known | NO_DRAWS

    @property
    def auxiliary(self) -> tuple[str, ...]:
        return tuple(name for name in ("squares", "factors") if getattr(self, name))

    @property
    def steady(self) -> bool:
        return not self.fresh

    @property
    def needs(self) -> frozenset[Need]:
        """The graph and another evaluation of the pass; for ``squares`` the per-example gradients too."""
        found: frozenset[Need] = frozenset({"graph", "replay"} if self.examples is None else {"replay"})
        if self.squares:
            return found | FisherEmp().needs
        return found | FisherMC().needs if self.factors else found

    @property
    def at_once(self) -> bool:
        """Whether products of several vectors can be vectorised."""
        return True

    @abstractmethod
    def multiplier(self, graph: Graph, replay: Replay) -> Multiply:
        """Returns the function ``v -> C v`` for one vector."""

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        assert step.batches is not None
        apply, own, search = self._applied(step, step.batches.curvature), step.batches.own, step.batches.search

        def product(sites: list[Site], squares: Tensor | None = None, layers: Layers | None = None) -> Product:
            layout = Layout(sites)
            losses = partial(_loss_at, layout, own.replay), partial(_loss_and_gradient_at, layout, search.replay)
            return Product(partial(apply, layout), *losses, squares, layers)

        reached = [s for s in step.sites if any(p.grad is not None for p in s.parameters.values())]
        chunk: dict[str, Evidence] = {site.name: product([site]) for site in reached}
        told = _squares(step) if self.squares else None, layer_factors(step) if self.factors else None
        chunk[WHOLE] = product(step.sites, *told)
        yield chunk

    def _applied(self, step: Step, batch: Batch) -> Apply:
        """The products on all examples, on examples drawn now, or on others in every call."""
        if self.examples is None:
            assert step.graph is not None
            return self._bound(batch, step.graph)
        generator = step.generator("examples", torch.device("cpu"))
        if self.fresh:
            return lambda layout, vectors: self._drawn(batch, generator)(layout, vectors)
        with step.tape.paused():
            return self._drawn(batch, generator)

    def _drawn(self, batch: Batch, generator: torch.Generator) -> Apply:
        assert self.examples is not None
        part = batch.sample(self.examples, generator)
        return self._bound(part, part.graph())

    def _bound(self, batch: Batch, graph: Graph) -> Apply:
        return partial(_apply, self.multiplier(graph, batch.replay), self.at_once, batch.scale())


@torch.no_grad()
def _squares(step: Step) -> Tensor:
    """The diagonal of `FisherEmp`: squared per-example gradients, zero for layers without any.  # (1, P)"""
    pieces = []
    for site in step.sites:
        like = next(iter(site.parameters.values()))
        pieces.append(torch.zeros(1, prod(site.shape), dtype=step.statistics_dtype(site), device=like.device))
    for chunk in FisherEmp().measure(step):
        for site, piece in zip(step.sites, pieces, strict=True):
            if site.name in chunk:
                outer = chunk[site.name]
                assert isinstance(outer, Outer)
                piece += outer.squares().reshape(1, -1)
    return torch.cat(pieces, 1)


@dataclass(frozen=True, kw_only=True)
class Hessian(Products):
    """The Hessian ``H = d^2 L / d theta^2`` of the loss of the batch, with its dropout masks and batch statistics.

    ``mode="reverse"`` is backward over backward, and falls back to forward over reverse where torch has no double backward;
    ``"forward"`` is forward over reverse; ``"difference"`` is ``(grad L(theta + e v) - grad L(theta - e v)) / 2 e``, which
    needs first derivatives only and is accurate to 1e-10 in float64 and 1e-4 in float32.

    Reference: Pearlmutter, Neural Computation 1994, "Fast exact multiplication by the Hessian".
    """

    definite: ClassVar[bool] = False

    mode: Mode = "reverse"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)

    @property
    def at_once(self) -> bool:
        """Not differences: they run the ordinary backward pass, which no function transform can enter."""
        return self.mode != "difference"

    def multiplier(self, graph: Graph, replay: Replay) -> Multiply:
        return partial(multiply_hessian, graph, replay, self.mode)


@dataclass(frozen=True, kw_only=True)
class GaussNewton(Products):
    """The generalised Gauss-Newton matrix ``G = J^T Lambda J``, ``J`` the Jacobian of the logits, ``Lambda`` the Hessian there.

    For the recognised losses it is the Fisher matrix. With ``setup_logits_repr`` ``Lambda`` is the Hessian of the whole loss in
    the named logits, by autograd: an unrecognised loss, or what is added to a recognised one, has to be convex in them. Where
    no loss is recognised and no logits are named, the outputs of the model are used; see `gradmaker.loss.autograd_terms`.

    Reference: Schraudolph, Neural Computation 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"outputs"}

    def multiplier(self, graph: Graph, replay: Replay) -> Multiply:
        graph.check_outputs()
        return partial(multiply_gauss_newton, graph)


def _apply(multiply: Multiply, at_once: bool, scale: Tensor | float, layout: Layout, vectors: Tensor) -> Tensor:
    """Products of vectors given as rows, vectorised where possible, with the same random numbers.  # (k, ...) -> (k, ...)"""
    spread = layout.spread(vectors)
    if at_once and len(vectors) > 1:
        images = torch.vmap(multiply, randomness="same")(spread)
    else:
        each = [multiply({p: v[j] for p, v in spread.items()}) for j in range(len(vectors))]
        images = {p: torch.stack([image[p] for image in each]) for p in each[0]}
    found = layout.gather(images, vectors.dtype).reshape(vectors.shape)
    return found * scale if isinstance(scale, Tensor) or scale != 1.0 else found


def _loss_at(layout: Layout, replay: Replay, displacement: Tensor) -> Tensor:
    """The loss at ``theta + displacement``.  # (1, P) -> ()"""
    return replay.loss_at({p: d[0] for p, d in layout.spread(displacement).items()}).reshape(())


def _loss_and_gradient_at(layout: Layout, replay: Replay, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at ``theta + displacement`` and its gradient.  # (1, P) -> (), (1, P)"""
    loss, gradient = replay.loss_and_gradient_at({p: d[0] for p, d in layout.spread(displacement).items()})
    return loss.reshape(()), layout.gather({p: g.unsqueeze(0) for p, g in gradient.items()}, displacement.dtype)


# ------------------------------------------------------------------ products
@torch.enable_grad()
def multiply_hessian(graph: Graph, replay: Replay, mode: Mode, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
    """``H v`` in the given mode; by forward over reverse where double backward is not supported.

    RuntimeError where the model has no second derivatives.
    """
    if mode == "difference":
        return _difference(replay, vectors)
    if mode == "reverse":
        try:
            return graph.hessian(vectors)
        except RuntimeError as error:
            if not _unsupported(error):
                raise
    try:
        return _forward_over_reverse(graph.parameters, replay, vectors)
    except RuntimeError as error:
        if not _unsupported(error):
            raise
        raise RuntimeError(
            "a product with the Hessian needs second derivatives, and this model has none, neither backwards twice nor "
            f"forwards over backwards ({_first_line(error)}); {ADVICE}, or take differences of gradients, by mode='difference'"
        ) from error


@torch.enable_grad()
def multiply_gauss_newton(graph: Graph, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
    """``J^T Lambda J v``. RuntimeError where the model has no second derivatives."""
    with second_derivatives("a Gauss-Newton product"):
        return graph.gauss_newton(vectors)


@contextmanager
def second_derivatives(product: str) -> Iterator[None]:
    """RuntimeError with what to do for torch's error about a missing second derivative.  product: name of the product"""
    try:
        yield
    except RuntimeError as error:
        if not _unsupported(error):
            raise
        raise RuntimeError(
            f"{product} needs second derivatives, which this model does not have ({_first_line(error)}); {ADVICE}"
        ) from error


def check_mode(mode: str) -> None:
    """Check the name of a mode. ValueError for an unknown one."""
    check_choice("mode", mode, get_args(Mode))


def _forward_over_reverse(parameters: list[nn.Parameter], replay: Replay, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
    moved = [p for p in parameters if p in vectors]
    refuse_scripted(replay.model, "a product with the Hessian")

    def loss(values: list[Tensor]) -> Tensor:
        with _Tangents():
            found: Tensor = replay.run(dict(zip(parameters, values, strict=True)))[1].reshape(())
        return found

    at = [p.detach() for p in parameters]
    tangents = [vectors[p] if p in vectors else torch.zeros_like(p) for p in parameters]
    assert moved
    images = torch.func.jvp(torch.func.grad(loss), (at,), (tangents,))[1]
    return dict(zip(parameters, images, strict=True))


class _Tangents(TorchFunctionMode):
    """Give both arguments of `F.mse_loss` a tangent: torch divides it in place, and fails where it stands for a constant."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.mse_loss:
            given = signature(function).bind(*args, **(kwargs or {})).arguments
            given["target"] = given["target"] + 0 * given["input"]
            given["input"] = given["input"] + 0 * given["target"]
            return function(**given)
        return function(*args, **(kwargs or {}))


def _difference(replay: Replay, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
    """``H v`` by a central difference, with the displacement that is best for the dtype of the weights."""
    size = torch.stack([v.abs().amax() for v in vectors.values() if v.numel()]).amax()
    widest = torch.stack([p.detach().abs().amax() for p in vectors if p.numel()]).amax().clamp(min=1.0)
    step = torch.finfo(size.dtype).eps ** DIFFERENCE * widest / torch.where(size > 0, size, 1.0)
    ahead, behind = (replay.gradient_at({p: sign * step * v for p, v in vectors.items()}) for sign in (1, -1))
    return {p: (ahead[p] - behind[p]) / (2 * step) for p in ahead}


def _unsupported(error: RuntimeError) -> bool:
    return any(words in str(error) for words in UNSUPPORTED)


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
