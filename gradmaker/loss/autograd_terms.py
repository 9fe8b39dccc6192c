"""Loss terms by autograd, for a loss that is not a sum of recognised ones: its Hessian in the outputs.

``Lambda_m = d^2 L / dz_m^2`` is formed by products with the Hessian of the loss in ``z``, without the model. The block
structure of the Hessian is tested, not assumed: single elements, rows along an axis, examples, or the whole batch, the first
with which the blocks reproduce the product of the Hessian with a random vector.

Where ``z = log softmax(y)``, ``Lambda`` is the Hessian in the logits ``y``: with ``J = I - 1 p^T`` and ``s = dL/dz``,
``d^2 L / dy^2 = J^T (d^2 L / dz^2) J - (sum_k s_k) (diag p - p p^T)``. A second product with ``J`` does not change it.

Reference: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmaker.errors import SelfCheckError
from gradmaker.loss.recorder import compute, log_axis
from gradmaker.loss.terms import CategoricalTerms, GaussianTerms, Place, Terms, rows_of
from gradmaker.reentrant import nodes

__all__ = ["WIDEST", "AutogradTerms", "Output", "autograd_terms", "centred", "hessian_products", "of_logits"]

WIDEST = 256
"""Most rows of a block, the entries of an output that depend on each other in the loss: each row costs a product."""
MOST = 2**27
"""Most numbers, of eight bytes each, in all blocks of an output."""
CLIPPED = 1e-3
"""Largest ratio of the negative to the positive eigenvalues, by their sums, at which the loss counts as convex."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-5}
"""Relative error of a product with a random vector, up to which a block structure is accepted."""

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Output:
    """An output that the loss is a function of."""

    z: Tensor  # in the graph
    axes: tuple[int, ...]  # candidates for the axis of a term's coordinates, the likelier first


@dataclass(frozen=True, eq=False)
class AutogradTerms(Terms):
    """Terms with ``Lambda = S S^T`` by blocks, columns ``S e_c``; sampled gradients are ``S`` times standard normal vectors."""

    factor: Tensor  # (m, C, C), S
    parts: int | None = None  # equal parts of z along its first axis, one term each; None: terms by ``axis``

    def spread(self, values: Tensor) -> Tensor:
        if self.parts is None:
            return super().spread(values)
        return values.reshape(-1, 1).expand(-1, self._width).reshape(self.z.shape)

    def _rows(self, x: Tensor) -> Tensor:
        return super()._rows(x) if self.parts is None else compute(x.detach()).reshape(self.parts, -1)

    @property
    def _width(self) -> int:
        return self.factor.shape[-1]

    def _restore(self, rows: Tensor) -> Tensor:
        return super()._restore(rows) if self.parts is None else rows.reshape(-1, *self.z.shape).to(self.z.dtype)

    def _columns(self, rows: Tensor, c: Tensor) -> Tensor:
        return self.factor[rows, :, c.unsqueeze(1)]

    def _draw(self, samples: int, generator: torch.Generator, place: Place) -> Tensor:
        noise = self.factor.new_empty(samples, place.total, self.factor.shape[1]).normal_(generator=generator)
        return torch.einsum("mcd,kmd->kmc", self.factor, place.of(noise, 1))

    def _inner(self, u: Tensor, v: Tensor) -> Tensor:
        return (self._to(u) * self._to(v)).sum()

    def _multiply(self, u: Tensor) -> Tensor:
        return torch.einsum("mcd,md->mc", self.factor, self._to(u))

    def _to(self, u: Tensor) -> Tensor:
        """``S^T u``.  # (m, C) -> (m, C)"""
        return torch.einsum("mcd,mc->md", self.factor, u.to(self.factor))


# -------------------------------------------------------------------- products at the outputs
def hessian_products(loss_gradients: Sequence[Tensor | None], outputs: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """``H v`` as the gradient of ``<dL/dz, v>``.  loss_gradients: in the graph  # like z each"""
    pairs = [(s, w) for s, w in zip(loss_gradients, v, strict=True) if s is not None and s.requires_grad]
    if not pairs:
        return [torch.zeros_like(z) for z in outputs]
    with torch.enable_grad():
        inner = torch.stack([(s * w).sum() for s, w in pairs]).sum()
    found = torch.autograd.grad(inner, list(outputs), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(z) if h is None else h for z, h in zip(outputs, found, strict=True)]


@torch.no_grad()
def in_logits(z: Tensor, axis: int, loss_gradient: Tensor, apply: Apply) -> Apply:
    """Products with the Hessian in the logits, from ``apply``, those with the Hessian in the log-probabilities ``z``."""

    def product(v: Tensor) -> Tensor:
        return of_logits(z, axis, loss_gradient, v, apply(centred(z, axis, v)))

    return product


def centred(z: Tensor, axis: int, v: Tensor) -> Tensor:
    """``J v`` with the Jacobian of log-probabilities in logits."""
    return v - (z.detach().exp() * v).sum(axis, keepdim=True)


def of_logits(z: Tensor, axis: int, loss_gradient: Tensor, v: Tensor, image: Tensor) -> Tensor:
    """The product of the Hessian in the logits with ``v``.  image: of the Hessian in the log-probabilities with ``J v``"""
    p, mass = z.detach().exp(), -loss_gradient.detach().sum(axis, keepdim=True)
    return image - p * image.sum(axis, keepdim=True) + mass * p * centred(z, axis, v)


# -------------------------------------------------------------------- one output
@dataclass
class _Block:
    """The Hessian of the loss in one output, given by its products."""

    z: Tensor
    loss_gradient: Tensor
    axes: Sequence[int]
    apply: Apply
    v: Tensor  # random
    image: Tensor  # H v
    examples: int
    M: Tensor
    classes: int | None = None  # the axis of log-probabilities
    wide: list[int] = field(default_factory=list)  # widths of blocks that are too large

    def terms(self) -> Terms:
        """Terms by the first block structure that reproduces the product with a random vector. SelfCheckError if none does."""
        found = self._diagonal() if self.classes is None else self._categorical()
        for axis in () if found is not None else dict.fromkeys((*self.axes, *range(1, self.z.ndim))):
            found = self._blocks(axis, None, self.z.shape[axis])
            if found is not None:
                break
        for parts in () if found is not None else dict.fromkeys((self.examples, 1)):
            if self.z.ndim and parts and self.z.shape[0] % parts == 0:
                found = self._blocks(None, parts, self.z.numel() // parts)
                if found is not None:
                    break
        if found is not None:
            return found
        raise SelfCheckError(
            f"the loss makes entries of an output of shape {tuple(self.z.shape)} depend on each other, and its Hessian there "
            f"has blocks of {min(self.wide, default=self.z.numel())} rows or more: at most {WIDEST} are formed, "
            f"and {MOST:,} numbers in all"
        )

    def _explains(self, image: Tensor) -> bool:
        limit = TOLERANCES.get(self.z.dtype, 5e-2)
        return float((image - self.image).double().norm()) <= limit * float(self.image.double().norm())

    def _counted(self, rows: Callable[[Tensor], Tensor], curvature: Tensor) -> Tensor:
        """1 for each term that contributes to the loss, else 0.  curvature: (m, *)"""
        used = rows(self.loss_gradient).ne(0).any(-1) | curvature.flatten(1).ne(0).any(-1)
        return used.to(compute(self.z).dtype)

    def _diagonal(self) -> Terms | None:
        d = self.apply(torch.ones_like(self.z))
        if not self._explains(d * self.v):
            return None
        axis = self.z.ndim - 1 if self.z.ndim > 1 else None
        curvature = rows_of(d, axis)
        _check_convex(self.z, curvature)
        omega = self._counted(lambda x: rows_of(x, axis), curvature)
        return GaussianTerms(self.z, axis, omega, self.M, curvature.clamp(min=0), assumed=omega / self.M.to(omega))

    def _categorical(self) -> Terms | None:
        """Terms of a loss that is linear in log-probabilities; None if it is not."""
        assert self.classes is not None
        mass = -rows_of(self.loss_gradient, self.classes).sum(-1)
        p = rows_of(self.z, self.classes).exp()
        found = CategoricalTerms(self.z, self.classes, mass, self.M, p)
        if bool((mass < 0).any()) or not self._explains(found.multiply(self.v)):
            return None
        return found

    def _blocks(self, axis: int | None, parts: int | None, width: int) -> Terms | None:
        if width > WIDEST or self.z.numel() * width > MOST:
            self.wide.append(width)
            return None
        like = torch.zeros_like(self.z)

        def rows(x: Tensor) -> Tensor:
            return compute(x).reshape(parts, -1) if parts is not None else rows_of(x, axis)

        def restore(x: Tensor) -> Tensor:
            if parts is not None:
                return x.reshape(like.shape)
            assert axis is not None
            return x.reshape(*like.shape[:axis], *like.shape[axis + 1 :], width).movedim(-1, axis)

        columns = []
        for c in range(width):
            unit = torch.zeros_like(rows(like))
            unit[:, c] = 1.0
            columns.append(rows(self.apply(restore(unit).to(like))))
        B = torch.stack(columns, -1).double()
        if not self._explains(restore(torch.einsum("mcd,md->mc", B, rows(self.v).double()))):
            return None
        s, Q = torch.linalg.eigh((B + B.mT) / 2)
        _check_convex(self.z, s)
        S = (Q * s.clamp(min=0).sqrt().unsqueeze(-2)).to(rows(like).dtype)
        omega = self._counted(rows, B)
        return AutogradTerms(self.z, axis, omega, self.M, S, parts, assumed=omega / self.M.to(omega))


def _check_convex(z: Tensor, eigenvalues: Tensor) -> None:
    """SelfCheckError if the negative eigenvalues are more than rounding, and more than `CLIPPED` allows."""
    below, above = (float(x.clamp(min=0).double().sum()) for x in (-eigenvalues, eigenvalues))
    half = z.dtype in (torch.float16, torch.bfloat16)
    if below > (3e-2 if half else CLIPPED) * above:
        raise SelfCheckError(
            f"the loss is not convex in an output of shape {tuple(z.shape)}: negative eigenvalues of its Hessian there are "
            f"{below / max(above, 1e-300):.1e} of the positive ones, and at most {CLIPPED:g} are set to zero; name by "
            "setup_logits_repr what it is convex in, as probabilities may be"
        )


# -------------------------------------------------------------------- all outputs
@torch.no_grad()
def autograd_terms(
    loss: Tensor, outputs: Sequence[Output], examples: int, M: Tensor, generator: torch.Generator
) -> tuple[list[Terms], list[Tensor]]:
    """The terms of a loss that is a function of these outputs, none of them computed from another, and ``dL/dz`` of each.

    M: the denominator of the empirical Fisher matrix. SelfCheckError where the loss has no second derivative, is not convex in
    an output, couples outputs, or has blocks that are too large.
    """
    zs = [o.z for o in outputs]
    seed = torch.ones_like(loss).requires_grad_()  # in the graph: else an operation with one derivative only would seem linear
    with torch.enable_grad():
        loss_gradients = torch.autograd.grad(loss, zs, seed, create_graph=True, materialize_grads=True)
    if any(node.name() == "torch::autograd::Error" for node in nodes([s for s in loss_gradients if s.requires_grad])):
        raise SelfCheckError("the loss can be differentiated only once")
    v = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in zs]
    try:
        together = hessian_products(loss_gradients, zs, v)
        applies = [_apply(s, z) for s, z in zip(loss_gradients, zs, strict=True)]
        alone = [apply(w) for apply, w in zip(applies, v, strict=True)]
    except (RuntimeError, NotImplementedError) as error:
        raise SelfCheckError(f"the loss has no second derivative ({str(error).splitlines()[0]})") from error
    size = sum(float(x.double().square().sum()) for x in together) ** 0.5
    for x, y in zip(together, alone, strict=True):
        if float((x - y).double().norm()) > TOLERANCES.get(x.dtype, 5e-2) * size:
            raise SelfCheckError("the loss couples outputs of the model: it is not a sum of a loss of each")
    found: list[Terms] = []
    for o, loss_gradient, apply, w, image in zip(outputs, loss_gradients, applies, v, alone, strict=True):
        classes = log_axis(o.z, o.axes)
        if classes is not None:
            apply = in_logits(o.z, classes, loss_gradient, apply)
            image = apply(w)
        likely = o.axes if classes is None else (classes, *o.axes)
        axes = [axis for axis in likely if axis > 0]  # along the first axis a row would mix examples
        found.append(_Block(o.z, loss_gradient.detach(), axes, apply, w, image, examples, M, classes).terms())
    return found, [s.detach() for s in loss_gradients]


def _apply(loss_gradient: Tensor, z: Tensor) -> Apply:
    return lambda v: hessian_products([loss_gradient], [z], [v])[0]
