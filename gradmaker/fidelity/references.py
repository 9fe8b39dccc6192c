"""Reference matrices of one batch: as matrices, and by their products; by autograd alone.

``L`` loss, ``z`` the outputs of which it is a function, ``J = dz/d theta``. Whatever is measured of a layer alone goes through
the products of its own parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gradmaker.fidelity.layers import Layer, Layers
from gradmaker.fidelity.problem import Batch, Problem
from gradmaker.loss.likelihood import read_terms
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import Terms
from gradmaker.loss.weights import numbers

__all__ = ["REFERENCES", "Reference", "ReferenceName", "reference_of"]

ReferenceName: TypeAlias = Literal["fisher_exact", "ggn", "hessian", "fisher_emp", "second_moment"]
REFERENCES: tuple[ReferenceName, ...] = get_args(ReferenceName)

UNRECOGNISED = (
    "a Fisher matrix needs a recognised loss: F.cross_entropy, F.nll_loss, F.mse_loss or F.binary_cross_entropy_with_logits, "
    "as functions or modules; for any other loss of one output tensor: reference='ggn'"
)


class Reference(ABC):
    """A curvature matrix of all trainable parameters, as one flat vector."""

    definite = True
    """Whether it is positive semidefinite."""

    def __init__(self, layers: Layers, gradient: Tensor) -> None:
        self.layers, self.gradient = layers, gradient

    def product(self, v: Tensor) -> Tensor:
        """``C v``.  # (P,)"""
        return self.layers.flat(self.multiply(range(len(self.layers.parameters)), self.layers.split(v.to(self.gradient))))

    def layer_product(self, layer: Layer, v: Tensor) -> Tensor:
        """``C_ll v`` with the block of a layer.  # (p,)"""
        parameters = [self.layers.parameters[k] for k in layer.positions]
        pieces = v.to(self.gradient).split([p.numel() for p in parameters])
        found = self.multiply(layer.positions, [x.view_as(p) for x, p in zip(pieces, parameters, strict=True)])
        return torch.cat([x.detach().reshape(-1) for x in found])

    @abstractmethod
    def multiply(self, positions: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
        """The product of the block of some parameters, in their shapes."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """``C``, in float64.  # (P, P)"""

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, bool] | None:
        """Random rows ``r`` with ``E r r^T = C``; None where there are none.  # (count, P)

        Also whether they are no sample: then ``sum r r^T = C``.
        """
        return None

    def release(self) -> None:  # noqa: B027
        """Drop the graphs that products of a layer have built."""


def reference_of(name: ReferenceName, problem: Problem, batches: Sequence[Batch]) -> Reference:
    """The reference matrix of a batch; only the second moment is one of several. ValueError for an unsuited loss."""
    if name == "second_moment":
        return SecondMoment(problem, batches)
    (batch,) = batches
    with LossRecorder() as recorder:
        result, loss = problem.evaluate(batch)
    parameters = problem.layers.parameters
    gradient = problem.layers.flat(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    if name == "hessian":
        return Hessian(problem.layers, gradient, loss)
    if name == "ggn" and isinstance(result, Tensor) and problem.loss is not None:
        return OfOutputs(problem.layers, gradient, [result], _second_derivative(problem, batch, result))
    terms = read_terms(recorder, loss)
    if not terms:
        raise ValueError(UNRECOGNISED)
    outputs = list({id(t.z): t.z for t in terms}.values())
    if name == "fisher_emp":
        columns = _empirical(terms, outputs, loss)
        return OfOutputs(problem.layers, gradient, outputs, columns.weigh, columns.draw)
    return OfOutputs(problem.layers, gradient, outputs, _Exact(terms, outputs).weigh, _Exact(terms, outputs).draw)


# ------------------------------------------------------------------ Lambda, the second derivative in the outputs
Weigh: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
Draw: TypeAlias = Callable[[torch.Generator], list[Tensor]]


def _second_derivative(problem: Problem, batch: Batch, result: Tensor) -> Weigh:
    """``u -> (d^2 L / dz^2) u`` by autograd on the loss alone."""
    z = result.detach().requires_grad_()
    (slope,) = torch.autograd.grad(problem.loss_of(z, batch), z, create_graph=True)

    def weigh(u: list[Tensor]) -> list[Tensor]:
        if not slope.requires_grad:  # linear in the outputs
            return [torch.zeros_like(z)]
        found = torch.autograd.grad(slope, z, u[0], retain_graph=True, allow_unused=True)[0]
        return [torch.zeros_like(z) if found is None else found]

    return weigh


class _Exact:
    """``Lambda_m`` of the terms of a recognised loss, and gradients at sampled targets, whose second moment is ``Lambda``."""

    def __init__(self, terms: list[Terms], outputs: list[Tensor]) -> None:
        self.terms, self.outputs = terms, outputs

    def weigh(self, u: list[Tensor]) -> list[Tensor]:
        return self._summed([t.multiply(u[self._place(t)]) for t in self.terms])

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        return self._summed([t.sample(1, generator)[0] for t in self.terms])

    def _place(self, terms: Terms) -> int:
        return next(k for k, z in enumerate(self.outputs) if z is terms.z)

    def _summed(self, found: list[Tensor]) -> list[Tensor]:
        out = [torch.zeros_like(z) for z in self.outputs]
        for terms, value in zip(self.terms, found, strict=True):
            out[self._place(terms)] = out[self._place(terms)] + value.to(terms.z)
        return out


class _Empirical(_Exact):
    """``c_m c_m^T`` with the gradients ``c_m = sqrt(M) dL/dz_m`` of the terms at the targets of the batch."""

    def __init__(self, terms: list[Terms], outputs: list[Tensor], columns: list[Tensor]) -> None:
        super().__init__(terms, outputs)
        self.columns = columns  # like z each

    def weigh(self, u: list[Tensor]) -> list[Tensor]:
        pairs = zip(self.terms, self.columns, strict=True)
        return self._summed([c * _of_terms(t, c * u[self._place(t)]) for t, c in pairs])

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        found = []
        for t, c in zip(self.terms, self.columns, strict=True):
            signs = torch.randint(0, 2, (t.omega.numel(),), generator=generator, device=c.device).to(c) * 2 - 1
            found.append(c * t.spread(signs))
        return self._summed(found)


def _of_terms(terms: Terms, values: Tensor) -> Tensor:
    """Sums over the coordinates of each term.  # like z"""
    return values if terms.axis is None else values.sum(terms.axis, keepdim=True)


def _empirical(terms: list[Terms], outputs: list[Tensor], loss: Tensor) -> _Empirical:
    alone = list({id(t.z): t for t in terms}.values())  # logits of several terms count once
    slopes = torch.autograd.grad(loss, outputs, retain_graph=True)
    M = [numbers([t for t in terms if t.z is a.z], a.omega.numel()) for a in alone]
    roots = [a.spread(m.sqrt().reshape(-1).expand(a.omega.numel())) for a, m in zip(alone, M, strict=True)]
    return _Empirical(alone, outputs, [s * root.to(s) for s, root in zip(slopes, roots, strict=True)])


# ------------------------------------------------------------------ matrices
class OfOutputs(Reference):
    """``J^T Lambda J``: the Gauss-Newton matrix, and Fisher matrices.

    Reference: Schraudolph, Neural Computation 2002; Martens, JMLR 2020, arXiv:1412.1193.
    """

    def __init__(self, layers: Layers, gradient: Tensor, outputs: list[Tensor], weigh: Weigh, draw: Draw | None = None) -> None:
        super().__init__(layers, gradient)
        self.outputs, self.weigh, self.draw = outputs, weigh, draw
        self._pullbacks: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor | None]]] = {}

    def multiply(self, positions: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
        return self._vjp(positions, self.weigh(self._jvp(positions, v)))

    def _jvp(self, positions: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
        """``J v``, as the derivative of ``u -> J^T u``, which is linear."""
        u, pulled = self._pullback(tuple(positions))
        pairs = [(g, x) for g, x in zip(pulled, v, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(z) for z in self.outputs]
        found = torch.autograd.grad(
            [g for g, _ in pairs], u, [x for _, x in pairs], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(found)

    def _pullback(self, positions: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
        if positions not in self._pullbacks:
            self.release()
            u = [torch.zeros_like(z, requires_grad=True) for z in self.outputs]
            parameters = [self.layers.parameters[k] for k in positions]
            pulled = torch.autograd.grad(self.outputs, parameters, u, create_graph=True, allow_unused=True)
            self._pullbacks[positions] = u, list(pulled)
        return self._pullbacks[positions]

    def release(self) -> None:
        self._pullbacks = {k: v for k, v in self._pullbacks.items() if len(k) == len(self.layers.parameters)}

    def _vjp(self, positions: Sequence[int], u: list[Tensor]) -> list[Tensor]:
        parameters = [self.layers.parameters[k] for k in positions]
        found = torch.autograd.grad(self.outputs, parameters, u, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def matrix(self) -> Tensor:
        J = self._jacobian().double()
        shapes = [z.numel() for z in self.outputs]
        weighted = []
        for column in J.mT:
            pieces = column.split(shapes)
            u = [x.view_as(z).to(z) for x, z in zip(pieces, self.outputs, strict=True)]
            weighted.append(torch.cat([x.detach().reshape(-1) for x in self.weigh(u)]).double())
        C = J.mT @ torch.stack(weighted, 1)
        return (C + C.mT) / 2

    def _jacobian(self) -> Tensor:
        """``J``, by a vjp for each output, or by a jvp for each parameter where these are fewer.  # (m, P)"""
        if sum(z.numel() for z in self.outputs) > 2 * self.layers.size:
            unit = torch.eye(self.layers.size, dtype=self.gradient.dtype, device=self.gradient.device)
            every = range(len(self.layers.parameters))
            columns = [self._jvp(every, self.layers.split(e)) for e in unit]
            return torch.stack([torch.cat([x.detach().reshape(-1) for x in column]) for column in columns], 1)
        rows = []
        for z in self.outputs:
            flat = z.reshape(-1)
            for k in range(len(flat)):
                found = torch.autograd.grad(flat[k], self.layers.parameters, retain_graph=True, allow_unused=True)
                rows.append(self.layers.flat(found))
        return torch.stack(rows)

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, bool] | None:
        if self.draw is None:
            return None
        every = range(len(self.layers.parameters))
        rows = self.gradient.new_empty(count, self.layers.size)
        for k in range(count):
            rows[k] = self.layers.flat(self._vjp(every, self.draw(generator)))
        return rows, False


class Hessian(Reference):
    """``d^2 L / d theta^2``, by backward of backward.

    Reference: Pearlmutter, Neural Computation 1994.
    """

    definite = False

    def __init__(self, layers: Layers, gradient: Tensor, loss: Tensor) -> None:
        super().__init__(layers, gradient)
        slopes = torch.autograd.grad(loss, layers.parameters, create_graph=True, allow_unused=True)
        self.slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(layers.parameters, slopes, strict=True)]

    def multiply(self, positions: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(self.slopes[k], x) for k, x in zip(positions, v, strict=True) if self.slopes[k].requires_grad]
        parameters = [self.layers.parameters[k] for k in positions]
        if not pairs:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(
            [g for g, _ in pairs], parameters, [x for _, x in pairs], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def matrix(self) -> Tensor:
        flat = torch.cat([g.reshape(-1) for g in self.slopes])
        rows = []
        for g in flat:
            found: Sequence[Tensor | None] = [None] * len(self.layers.parameters)
            if g.requires_grad:
                found = torch.autograd.grad(g, self.layers.parameters, retain_graph=True, allow_unused=True)
            rows.append(self.layers.flat(found))
        H = torch.stack(rows).double()
        return (H + H.mT) / 2


class SecondMoment(Reference):
    """``1/B sum_b g_b g_b^T`` with the gradients of ``B`` batches: full-matrix AdaGrad, as a mean.

    Reference: Duchi, Hazan & Singer, JMLR 2011; Agarwal et al., ICML 2019, arXiv:1806.02958.
    """

    def __init__(self, problem: Problem, batches: Sequence[Batch]) -> None:
        layers, found = problem.layers, []
        for batch in batches:
            loss = problem.evaluate(batch)[1]
            found.append(layers.flat(torch.autograd.grad(loss, layers.parameters, allow_unused=True)))
        super().__init__(layers, found[-1])
        self.held = torch.stack(found) / len(found) ** 0.5

    def multiply(self, positions: Sequence[int], v: Sequence[Tensor]) -> list[Tensor]:
        pieces = [self.held[:, self.layers.slices[k]] for k in positions]
        inner = torch.stack([X @ x.reshape(-1) for X, x in zip(pieces, v, strict=True)]).sum(0)
        return [(inner @ X).view_as(x) for X, x in zip(pieces, v, strict=True)]

    def matrix(self) -> Tensor:
        rows = self.held.double()
        C: Tensor = rows.mT @ rows
        return C

    def rows(self, count: int, generator: torch.Generator) -> tuple[Tensor, bool] | None:
        return self.held, True
