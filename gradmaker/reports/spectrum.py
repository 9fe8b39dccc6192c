"""Curvature of a model without a maker: products, leading eigenpairs, trace, diagonal and spectral density, matrix-free.

Everywhere ``loss`` is a function without arguments that calls the model on a batch and returns its loss, and vectors are flat,
in the order of ``torch.nn.utils.parameters_to_vector`` for the trainable parameters, complex ones as their real pairs.
Weights, gradients, buffers and the global random state stay as they are; dropout draws the same masks in every product of one
call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import pi, prod
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gradmaker.capture.model_checks import check_parameters
from gradmaker.curvature.hessian import Mode, check_mode, multiply_gauss_newton, multiply_hessian, second_derivatives
from gradmaker.linalg.real_pairs import as_real, real_dtype, real_shape, write_real
from gradmaker.loss.likelihood import read_terms
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import Terms
from gradmaker.loss.weights import numbers
from gradmaker.options.checks import check_choice
from gradmaker.passes.graph import Graph
from gradmaker.passes.replay import Replay

__all__ = ["Density", "diagonal", "eigenpairs", "fvp", "ggnvp", "hvp", "ntk_vp", "spectral_density", "trace"]

Loss: TypeAlias = Callable[[], Tensor]
Matvec: TypeAlias = Callable[[Tensor], Tensor]
Matrix: TypeAlias = Literal["hessian", "ggn", "fisher"]
Kind: TypeAlias = Literal["exact", "mc", "empirical"]


def hvp(model: nn.Module, loss: Loss, vector: Tensor, mode: Mode = "reverse") -> Tensor:
    """``H v``, ``H`` the Hessian of the loss.  # (P,) -> (P,)

    mode: reverse (backwards twice; forwards over backwards where that is not supported), forward, or difference.
    Reference: Pearlmutter, Neural Computation 1994.
    """
    return _Curvature(model, loss).hessian(vector, mode)


def ggnvp(model: nn.Module, loss: Loss, vector: Tensor, outputs: Callable[[], Tensor] | None = None) -> Tensor:
    """``J^T Lambda J v``, ``Lambda`` the Hessian of the loss in the model's outputs.  # (P,) -> (P,)

    Without ``outputs``, ``Lambda`` is that of the recognised terms of the loss.
    outputs: for any other convex loss: the outputs of which ``loss`` is then a function, ``loss(outputs)``.
    Reference: Schraudolph, Neural Computation 2002.
    """
    return _Curvature(model, loss, outputs).gauss_newton(vector)


def fvp(model: nn.Module, loss: Loss, vector: Tensor, kind: Kind = "exact", samples: int = 1, seed: int = 0) -> Tensor:
    """``F v``, ``F`` the Fisher matrix of a recognised loss; loss terms (tokens of a sequence) are examples.  # (P,) -> (P,)

    kind: exact, mc (``samples`` targets drawn from the model, keyed by ``seed``) or empirical (the observed targets).
    Reference: Martens, JMLR 2020, arXiv:1412.1193; Kunstner, Balles & Hennig, NeurIPS 2019, arXiv:1905.12558.
    """
    return _Curvature(model, loss).fisher(vector, kind, samples, seed)


@torch.enable_grad()
def ntk_vp(model: nn.Module, outputs: Callable[[], Tensor], vector: Tensor) -> Tensor:
    """``J J^T u``, the neural tangent kernel of a batch times a vector in the shape of the outputs.

    Reference: Jacot, Gabriel & Hongler, NeurIPS 2018, arXiv:1806.07572.
    """
    z = Replay(model, lambda: (None, outputs())).run()[1]
    graph = Graph(model, (z * vector.to(z.dtype)).sum(), [])
    gradients = {p: g.detach() for p, g in graph.gradients.items() if g is not None}
    with second_derivatives("a product with the tangent kernel"):
        return graph.jvp([z], gradients)[0].detach()


def eigenpairs(
    model: nn.Module,
    loss: Loss,
    count: int = 1,
    matrix: Matrix = "hessian",
    method: Literal["lanczos", "power"] = "lanczos",
    iterations: int = 100,
    seed: int = 0,
    mode: Mode = "reverse",
) -> tuple[Tensor, Tensor]:
    """The eigenvalues largest in absolute value, in falling order, and their eigenvectors as rows.  # (count,), (count, P)

    lanczos: Ritz pairs of ``iterations`` vectors, all of which are held. power: ``iterations`` products for every pair, with
    the pairs found before projected out, which holds ``count`` vectors. mode: of products with the Hessian, as in `hvp`.
    ValueError unless ``1 <= count <= P``.
    Reference: Golub & Van Loan, Matrix Computations, chapter 10; Yao et al., 2020, arXiv:1912.07145 (PyHessian).
    """
    curvature = _Curvature(model, loss)
    if not 1 <= count <= curvature.size:
        raise ValueError(f"count={count!r}: expected 1 to {curvature.size}, the number of trainable parameters")
    check_choice("method", method, ("lanczos", "power"))
    matvec, start = curvature.matvec(matrix, mode), curvature.draw(seed, "gaussian")
    if method == "power":
        return _power(matvec, start, count, iterations)
    T, V = _lanczos(matvec, start, max(count, min(iterations, curvature.size)))
    s, Q = torch.linalg.eigh(T)
    order = s.abs().argsort(descending=True)[:count]
    return s[order].to(V.dtype), Q[:, order].mT.to(V.dtype) @ V


def trace(
    model: nn.Module, loss: Loss, samples: int = 100, matrix: Matrix = "hessian", seed: int = 0, mode: Mode = "reverse"
) -> tuple[float, float]:
    """The trace and its standard error, as the mean of ``v^T C v`` over random signs ``v``.

    ValueError for less than two samples.
    Reference: Hutchinson, Communications in Statistics 1990.
    """
    curvature = _sampled(model, loss, samples)
    matvec = curvature.matvec(matrix, mode)
    probes = (curvature.draw(seed + j, "signs") for j in range(samples))
    values = torch.stack([(v.double() * matvec(v).double()).sum() for v in probes])
    return float(values.mean()), float(values.std() / samples**0.5)


def diagonal(
    model: nn.Module, loss: Loss, samples: int = 100, matrix: Matrix = "hessian", seed: int = 0, mode: Mode = "reverse"
) -> tuple[Tensor, Tensor]:
    """The diagonal and its standard error, as the mean of ``v * C v`` over random signs ``v``.  # (P,), (P,)

    One sample of entry ``i`` has the variance ``sum_(j != i) C_ij^2``. ValueError for less than two samples.
    Reference: Bekas, Kokiopoulou & Saad, Applied Numerical Mathematics 2007.
    """
    curvature = _sampled(model, loss, samples)
    matvec = curvature.matvec(matrix, mode)
    mean = squares = curvature.draw(seed, "signs").mul_(0)
    for j in range(samples):
        v = curvature.draw(seed + j, "signs")
        away = v * matvec(v) - mean
        mean = mean + away / (j + 1)
        squares = squares + away.square() * (j / (j + 1))
    return mean, (squares / (samples - 1) / samples).sqrt()


def _sampled(model: nn.Module, loss: Loss, samples: int) -> _Curvature:
    if samples < 2:
        raise ValueError(f"samples={samples!r}: expected at least 2, so that there is a standard error")
    return _Curvature(model, loss)


@dataclass(frozen=True)
class Density:
    """A spectrum as point masses: ``weights`` sum to one, and their mean is the trace over ``P``.

    ``smooth(grid, width)`` is the density with every point replaced by a Gaussian of this width.
    """

    nodes: Tensor  # (m,)
    weights: Tensor  # (m,)

    def smooth(self, grid: Tensor, width: float) -> Tensor:
        """The density at the points of a grid.  # like grid"""
        distance = (grid.unsqueeze(-1) - self.nodes) / width
        density: Tensor = (self.weights * (-distance.square() / 2).exp()).sum(-1) / (width * (2 * pi) ** 0.5)
        return density


def spectral_density(
    model: nn.Module,
    loss: Loss,
    probes: int = 10,
    steps: int = 50,
    matrix: Matrix = "hessian",
    seed: int = 0,
    mode: Mode = "reverse",
) -> Density:
    """The density of eigenvalues by stochastic Lanczos quadrature: ``probes`` random vectors, ``steps`` products for each.

    All ``steps`` vectors of a probe are held. ValueError for less than one probe or step.

    Reference: Ghorbani, Krishnan & Xiao, ICML 2019, arXiv:1901.10159; Golub & Welsch 1969 for nodes and weights.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes={probes!r}, steps={steps!r}: expected integers of at least 1")
    curvature = _Curvature(model, loss)
    matvec = curvature.matvec(matrix, mode)
    nodes, weights = [], []
    for j in range(probes):
        T = _lanczos(matvec, curvature.draw(seed + j, "signs"), min(steps, curvature.size))[0]
        s, Q = torch.linalg.eigh(T)
        nodes.append(s)
        weights.append(Q[0].square() / probes)
    return Density(torch.cat(nodes), torch.cat(weights))


# ------------------------------------------------------------------ the curvature of one batch
class _Curvature:
    """The graph of one evaluation of the loss, and products of its curvature with flat vectors."""

    def __init__(self, model: nn.Module, loss: Loss | Callable[[Tensor], Tensor], outputs: Callable[[], Tensor] | None = None):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad on those that are meant")
        check_parameters(model)
        self.size = sum(prod(real_shape(p)) for p in self.parameters)

        def evaluate() -> tuple[Any, Tensor]:
            arguments = () if outputs is None else (outputs(),)
            return arguments, loss(*arguments)

        self.replay = Replay(model, evaluate)
        with torch.enable_grad():
            with LossRecorder() as recorder:
                declared, value = self.replay.run()
            if value.numel() != 1:
                raise ValueError(f"the loss must be a tensor with one element, got shape {tuple(value.shape)}")
            self.terms: list[Terms] = [] if declared else read_terms(recorder, value)
            self.graph = Graph(model, value, self.terms, declared[0] if declared else None)

    def matvec(self, matrix: Matrix, mode: Mode) -> Matvec:
        """The product with a matrix, by its name. ValueError for a mode of another matrix."""
        check_choice("matrix", matrix, get_args(Matrix))
        if mode != "reverse" and matrix != "hessian":
            raise ValueError(f"mode={mode!r} would have no effect: it is of products with the Hessian, and matrix={matrix!r}")
        products: dict[Matrix, Matvec] = {
            "hessian": partial(self.hessian, mode=mode),
            "ggn": self.gauss_newton,
            "fisher": self.fisher,
        }
        return products[matrix]

    def hessian(self, v: Tensor, mode: Mode = "reverse") -> Tensor:
        """``H v``."""
        check_mode(mode)
        return self._flat(multiply_hessian(self.graph, self.replay, mode, self._split(v)))

    def gauss_newton(self, v: Tensor) -> Tensor:
        """``J^T Lambda J v``."""
        return self._flat(multiply_gauss_newton(self.graph, self._split(v)))

    @torch.enable_grad()
    def fisher(self, v: Tensor, kind: Kind = "exact", samples: int = 1, seed: int = 0) -> Tensor:
        """``F v``: the vjp of ``Lambda_m (J v)_m`` of every loss term ``m``, with ``sum_k c_mk c_mk^T`` for ``Lambda_m``."""
        check_choice("kind", kind, get_args(Kind))
        if not self.terms:
            raise ValueError(
                "a Fisher product needs a recognised loss: F.cross_entropy, F.nll_loss, F.mse_loss or "
                "F.binary_cross_entropy_with_logits, as functions or modules"
            )
        terms = self.terms
        if kind == "empirical":  # whose gradients are those of the whole loss: logits of several terms count once
            terms = list({id(t.z): t for t in terms}.values())
        outputs = [t.z for t in terms]
        with second_derivatives("a Fisher product"):
            jvps = self.graph.jvp(outputs, self._split(v))
        pairs = list(zip(terms, jvps, strict=True))
        if kind == "exact":
            weighted = [t.multiply(u) for t, u in pairs]
        else:
            weighted = [_weigh(t, u, self._cotangents(j, t, kind, samples, seed)) for j, (t, u) in enumerate(pairs)]
        found = torch.autograd.grad(outputs, self.parameters, weighted, retain_graph=True, allow_unused=True)
        return self._flat(dict(zip(self.parameters, found, strict=True)))

    def _cotangents(self, index: int, terms: Terms, kind: Kind, samples: int, seed: int) -> Tensor:
        """The vectors ``c`` of a loss term.  # (k, *z.shape)"""
        if kind == "mc":
            return terms.sample(samples, torch.Generator(terms.z.device).manual_seed(seed + 7919 * index))
        (loss_gradient,) = torch.autograd.grad(self.graph.loss, terms.z, retain_graph=True)
        m = terms.omega.numel()
        root = numbers([t for t in self.terms if t.z is terms.z], m).sqrt()
        return terms.empirical(loss_gradient, m, root.unsqueeze(1))

    def draw(self, seed: int, distribution: Literal["gaussian", "signs"]) -> Tensor:
        """A random vector.  # (P,)"""
        like = self.parameters[0]
        generator = torch.Generator(like.device).manual_seed(seed)
        dtype = real_dtype(like)
        v = torch.randn(self.size, dtype=dtype, device=like.device, generator=generator)
        return v if distribution == "gaussian" else torch.where(v < 0, -1.0, 1.0).to(dtype)

    def _split(self, v: Tensor) -> dict[nn.Parameter, Tensor]:
        if tuple(v.shape) != (self.size,):
            raise ValueError(
                f"the vector has shape {tuple(v.shape)}, expected ({self.size},): one number a trainable parameter"
            )
        found = {p: torch.empty_like(p, requires_grad=False) for p in self.parameters}
        for p, piece in zip(self.parameters, v.split([prod(real_shape(p)) for p in self.parameters]), strict=True):
            write_real(found[p], piece)
        return found

    def _flat(self, values: Any) -> Tensor:
        found = [torch.zeros_like(p) if values[p] is None else values[p] for p in self.parameters]
        return torch.cat([as_real(value.detach()).reshape(-1) for value in found]).to(real_dtype(self.parameters[0]))


def _weigh(terms: Terms, u: Tensor, c: Tensor) -> Tensor:
    """``sum_k c_k <c_k, u>`` for every loss term.  # like z"""
    inner = c * u if terms.axis is None else (c * u).sum(terms.axis + 1, keepdim=True)
    return (c * inner).sum(0)


# ------------------------------------------------------------------ linear algebra
def _power(matvec: Matvec, start: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Power iteration of ``C^2`` with deflation; a final Rayleigh-Ritz step separates pairs of opposite eigenvalues."""
    found = start.new_zeros(0, len(start))
    for _ in range(count):
        v = _without(start, found)
        for _ in range(iterations):
            v = _without(matvec(v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)), found)
        found = torch.cat([found, (v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)).unsqueeze(0)])
    s, Q = torch.linalg.eigh(_symmetric(torch.stack([found @ matvec(v) for v in found])))
    order = s.abs().argsort(descending=True)
    return s[order], Q[:, order].mT @ found


def _lanczos(matvec: Matvec, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``T = V C V^T`` and orthonormal rows ``V``, orthogonalised twice against all; shorter if the Krylov space is exhausted.

    In that case the part of ``C`` in this space is exact.  # (m, m) float64, (m, P)
    """
    V, T = start.new_empty(steps, len(start)), start.new_zeros(steps, steps, dtype=torch.float64)
    u, size, m = start, start.norm(), 0
    while m < steps:
        u = _without(u, V[:m])
        if not u.norm() > max(1e-10, 1e3 * torch.finfo(u.dtype).eps) * size:
            break
        V[m] = u / u.norm()
        u = matvec(V[m])
        m += 1
        T[:m, m - 1] = V[:m] @ u
        size = u.norm()
    T = T[:m, :m]
    return T + T.triu(1).mT, V[:m]


def _without(u: Tensor, V: Tensor) -> Tensor:
    """``u`` minus its projection on the span of the rows of ``V``."""
    for _ in range(2):
        u = u - (V @ u) @ V
    return u


def _symmetric(A: Tensor) -> Tensor:
    return (A + A.mT) / 2
