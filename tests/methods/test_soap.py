"""SOAP and eigenvalue-corrected Shampoo: whole runs, the reference's first step, invariance of the basis, tracking."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.curvature import Gradient
from gradmaker.linalg.orthogonal_iteration import (
    off_diagonal,
    orthonormal,
    power_step,
    rayleigh_quotients,
    sorted_eigenvectors,
    staleness,
)
from gradmaker.representations import RotatedDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import RotatedDivision
from tests import oracles
from tests.kronecker_reference import Reference, on_axis, unfolded
from tests.methods.test_kronecker_dims import gradients, run
from tests.methods.test_trajectories import compare
from tests.models import Case
from tests.refreshing import follow


class Soap:
    """The reference's step, tensor by tensor: project, average, step, statistics, QR for every T-th step."""

    def __init__(self, T: int, b: float, eps: float, skip: bool, b1: float = 0.0, vectors: bool = False) -> None:
        self.T, self.b, self.eps, self.skip, self.b1, self.vectors, self.t = T, b, eps, skip, b1, vectors, 0
        self.H: list[Tensor] = []
        self.Q: list[Tensor] = []
        self.history: list[Tensor] = []
        self.V: Any = 0.0
        self.mass = 0.0

    def turn(self, g: Tensor, back: bool = False) -> Tensor:
        for axis, Q in enumerate(self.Q):
            g = on_axis(Q if back else Q.T, g, axis)
        return g

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        turned = g.ndim > 1 or self.vectors
        if step == 0:
            if turned:
                self.H = [(1 - self.b) * unfolded(g, k) @ unfolded(g, k).T for k in range(g.ndim)]
                self.Q = [torch.linalg.eigh(H)[1].flip(1) for H in self.H]
            if self.skip:
                return torch.zeros_like(g)
            self.t, self.mass = 1, 1 - self.b
            self.V = self.mass * (g.square().mean() * torch.ones_like(g) if turned else g.square())
        else:
            second = turned and step == 1 and not self.skip  # equal entries give way to the next gradient
            self.t, kept = self.t + 1, 1e-4 * self.b if second else self.b
            self.mass, self.V = kept * self.mass + (1 - self.b), kept * self.V + (1 - self.b) * self.turn(g).square()
        if self.skip:  # the reference's average knows nothing of the first gradient
            self.history.append(g)
            weights = [(1 - self.b1) * self.b1**age for age in reversed(range(self.t))]
            m = sum(w * h for w, h in zip(weights, self.history, strict=True)) / (1 - self.b1**self.t)  # type: ignore[assignment]
        U = self.turn(m) / (torch.as_tensor(self.V).sqrt() + self.eps) * self.mass**0.5
        U = self.turn(U, back=True)
        if step > 0 and turned:
            self.H = [self.b * H + (1 - self.b) * unfolded(g, k) @ unfolded(g, k).T for k, H in enumerate(self.H)]
        if turned and (step + 1) % self.T == 0:  # for the step that follows
            self.refresh()
        return U

    def refresh(self) -> None:
        for k, (H, Q) in enumerate(zip(self.H, self.Q, strict=True)):
            order = (Q.T @ H @ Q).diagonal().argsort(descending=True)
            self.V = self.V.index_select(k, order)
            self.Q[k] = torch.linalg.qr(H @ Q[:, order])[0]


class Eshampoo:
    """Bases by decomposition before the moments are measured."""

    def __init__(self, T: int, b: float, eps: float, e: float) -> None:
        self.T, self.b, self.eps, self.e, self.t = T, b, eps, e, 0
        self.H: list[Any] = []
        self.Q: list[Tensor] = []
        self.V: Any = 0.0
        self.mass = 0.0

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.t += 1
        old = self.H or [0.0] * g.ndim
        self.H = [self.b * H + (1 - self.b) * unfolded(g, k) @ unfolded(g, k).T for k, H in enumerate(old)]
        if step % self.T == 0:
            self.Q = [torch.linalg.eigh(H)[1].flip(1) for H in self.H]
        turned, back = g, m
        for axis, Q in enumerate(self.Q):
            turned, back = on_axis(Q.T, turned, axis), on_axis(Q.T, back, axis)
        fresh, kept = turned.square() if step else g.square().mean() * torch.ones_like(g), self.b * (1e-4 if step == 1 else 1)
        self.V, self.mass = kept * self.V + (1 - self.b) * fresh, kept * self.mass + (1 - self.b)
        back = back / ((self.V / self.mass) ** self.e + self.eps)
        for axis, Q in enumerate(self.Q):
            back = on_axis(Q, back, axis)
        return back


def square(bias: bool = True) -> Case:
    """Gradients of full rank from the first step on: otherwise the basis of the null space is anybody's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 4, bias), nn.Tanh(), nn.Linear(4, 4, bias)).double()
        x, t = torch.randn(2, 16, 4, dtype=torch.float64)
        return Case(model, x, t, lambda y, t: (y - t).square().mean())


def filters() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        layers = [nn.Conv2d(2, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
        x, t = torch.randn(16, 2, 4, 4, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
        return Case(nn.Sequential(*layers).double(), x, t, lambda y, t: (y - t).square().mean())


SOAP_ROWS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "every_step": (square, lambda: Soap(1, 0.95, 1e-8, False), {"preconditioner_interval": 1, "beta1": 0.0}),
    "interval": (square, lambda: Soap(3, 0.9, 1e-3, False), {"preconditioner_interval": 3, "decay": 0.9, "damping": 1e-3}),
    "momentum": (square, lambda: Soap(10, 0.95, 1e-8, False), {}),
    "order_4": (filters, lambda: Soap(3, 0.9, 1e-4, False), {"preconditioner_interval": 3, "decay": 0.9, "damping": 1e-4}),
    "merged_blocks": (
        filters,
        lambda: Soap(3, 0.9, 1e-4, False),
        {"preconditioner_interval": 3, "decay": 0.9, "damping": 1e-4, "merge": "to_2d", "block_size": 4},
    ),
    "skip_first": (
        square,
        lambda: Soap(3, 0.95, 1e-8, True, 0.9),
        {"preconditioner_interval": 3, "skip_first": True, "beta1": 0.9},
    ),
}


@pytest.mark.parametrize("row", SOAP_ROWS)
def test_soap(row: str) -> None:
    make, rule, options = SOAP_ROWS[row]
    case = make()
    maker = from_config(case.model, {"method": "soap", "skip_first": False, **options})
    names = {"block_size": "block"}
    own = {names.get(k, k): v for k, v in {"beta1": 0.95, **options}.items() if k in ("merge", "block_size", "beta1")}
    compare(case, maker, Reference(rule, **own), 5e-3, 1e-6)


@pytest.mark.parametrize(
    "T, e, options", [(1, 0.5, {}), (3, 0.5, {"preconditioner_interval": 3}), (1, 0.3, {"exponent": 0.3, "damping": 1e-3})]
)
def test_eshampoo(T: int, e: float, options: dict[str, Any]) -> None:
    case = square(bias=False)
    eps = options.get("damping", 1e-6)
    maker = from_config(case.model, {"method": "eshampoo", "tracking": "eigh", "tolerance": 0.0, "damping": eps, **options})
    compare(case, maker, Reference(lambda: Eshampoo(T, 0.95, eps, e), beta1=0.9), 5e-3, 1e-6)


def test_identity_basis_is_adam() -> None:
    """All axes too wide for a basis; the epsilon is added before the bias correction, as SOAP's code does."""
    steps = [[g] for g in gradients(3, 4)]
    found = run({"method": "soap", "max_dim": 2, "damping": 1e-3, "skip_first": False}, steps)[0]
    m, v = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for (g,) in steps:
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
    correction = 1 - 0.95 ** len(steps)
    torch.testing.assert_close(found, m / correction * correction**0.5 / (v.sqrt() + 1e-3), rtol=1e-11, atol=0)


def test_a_fixed_basis_is_adam_on_the_rotated_problem() -> None:
    steps = gradients(3, 4, steps=8)
    found = run({"method": "soap", "preconditioner_interval": 1000, "skip_first": True, "beta1": 0.0}, [[g] for g in steps])[0]
    Q, P = torch.linalg.eigh(steps[0] @ steps[0].T)[1], torch.linalg.eigh(steps[0].T @ steps[0])[1]
    rotated = [Q.T @ g @ P for g in steps[1:]]
    weights = [0.05 * 0.95**age for age in reversed(range(7))]
    v = sum(w * g**2 for w, g in zip(weights, rotated, strict=True))
    assert (
        oracles.relative_error(found, Q @ (rotated[-1] / (torch.as_tensor(v).sqrt() + 1e-8) * sum(weights) ** 0.5) @ P.T) < 1e-6
    )


def filled(steps: int = 6, interval: int = 10, **options: Any) -> tuple[RotatedDims, dict[str, Tensor]]:
    representation = RotatedDims(**options)
    state = representation.init(Frame(1, (3, 4), frozenset(), torch.float64, torch.device("cpu")))
    evidence = [Gradient(g.unsqueeze(0)) for g in gradients(3, 4, steps=steps)]
    return representation, follow(representation, state, evidence, Fold(0.9, 0.1, 0.1), interval)


def direction(representation: RotatedDims, state: dict[str, Tensor]) -> Tensor:
    solver = RotatedDivision()
    return solver.solve(representation, solver.prepare(representation, state, None), gradients(3, 4, seed=5)[0].unsqueeze(0))


def test_signs_and_order_of_columns_do_not_matter_if_the_moments_follow() -> None:
    representation, state = filled()
    before = direction(representation, state)
    order = torch.tensor([2, 0, 1])
    state["basis_0"] = state["basis_0"][:, :, order] * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    assert oracles.relative_error(direction(representation, state), before) > 1e-3  # the control
    state["moments"] = state["moments"][:, order]
    torch.testing.assert_close(direction(representation, state), before, rtol=1e-10, atol=1e-12)


def test_moments_are_the_nearest_diagonal_in_the_basis() -> None:
    steps = gradients(3, 4, steps=30)
    Q = oracles.kron(*(torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in (3, 4)))
    A = torch.stack([torch.outer(g.reshape(-1), g.reshape(-1)) for g in steps]).mean(0)
    best = torch.stack([(Q.T @ g.reshape(-1)).square() for g in steps]).mean(0)
    for e in gradients(12, steps=20, seed=3):
        assert (A - Q @ torch.diag(best) @ Q.T).norm() <= (A - Q @ torch.diag(best + 1e-3 * e) @ Q.T).norm()


def test_rank_one_moments_are_balanced_shampoo() -> None:
    """tr(L)^1/2 L^-1/2 G R^-1/2 is division by sqrt(a b^T / tr) in the eigenbasis."""
    representation, state = filled(steps=30, tracking="eigh", sequence="basis_first", interval=1)
    L, R = state["factor_0"][0], state["factor_1"][0]
    a, Q = torch.linalg.eigh(L)
    b, P = torch.linalg.eigh(R)
    state["basis_0"], state["basis_1"] = Q[None], P[None]
    state["moments"] = torch.outer(a, b)[None] / L.trace() * state["mass"]
    g = gradients(3, 4, seed=5)[0]
    expected = L.trace() ** 0.5 * oracles.matrix_power(L, -0.5) @ g @ oracles.matrix_power(R, -0.5)
    assert oracles.relative_error(direction(representation, state)[0], expected) < 1e-6


# --- tracking -------------------------------------------------------------------------------------------------------------
def spd(d: int, count: int = 2) -> Tensor:
    Q = torch.linalg.qr(torch.randn(count, d, d, dtype=torch.float64))[0]
    return (Q * torch.logspace(0, -3, d, dtype=torch.float64)) @ Q.mT


@pytest.mark.parametrize("step", [lambda A, Q: power_step(A, Q)[0], lambda A, Q: orthonormal(A @ Q)])
def test_tracking_converges_and_stays_orthogonal(step: Any) -> None:
    A = spd(6)
    Q = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    ratios = []
    for _ in range(100):
        Q = step(A, Q)
        ratios.append(float(off_diagonal(A, Q).max()))
    assert ratios[-1] < 1e-6 and all(b <= a * 1.01 + 1e-12 for a, b in pairwise(ratios[5:]))
    assert (Q.mT @ Q - torch.eye(6, dtype=torch.float64)).abs().max() < 1e-12
    assert (sorted_eigenvectors(A).mT @ Q).abs().diagonal(dim1=1, dim2=2).min() > 1 - 1e-6


def test_the_order_of_a_power_step_is_that_of_the_moments() -> None:
    A = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))[None]
    Q, order = power_step(A, torch.eye(3, dtype=torch.float64)[None])
    assert order.tolist() == [[1, 2, 0]] and torch.equal(Q.abs(), torch.eye(3, dtype=torch.float64)[:, [1, 2, 0]][None])


@pytest.mark.parametrize("d", [6, 512])
def test_the_factor_of_a_qr_is_that_of_its_definition(d: int) -> None:
    """Padded where rows are aliased in a cache: upper triangular in it, orthogonal, and the same as unpadded."""
    A = torch.randn(2, d, d, dtype=torch.float64)
    Q = orthonormal(A)
    assert Q.shape == A.shape and (Q.mT @ Q - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-12
    assert (Q.mT @ A).tril(-1).abs().max() < 1e-11
    torch.testing.assert_close(Q, torch.linalg.qr(A)[0], rtol=0, atol=1e-9)


def test_a_step_is_one_of_the_qr_algorithm() -> None:
    """``B = Q^T A Q = Q_1 R_1``, ``Q Q_1``, but for signs."""
    A, Q = spd(6), torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    expected = Q @ torch.linalg.qr(Q.mT @ A @ Q)[0]
    overlap = (expected.mT @ orthonormal(A @ Q)).abs()
    assert (overlap - torch.eye(6, dtype=torch.float64)).abs().max() < 1e-10


def test_staleness_is_the_off_diagonal_share() -> None:
    A, Q = spd(6, 3), torch.linalg.qr(torch.randn(3, 6, 6, dtype=torch.float64))[0]
    A[2] = 0
    found = staleness(A, rayleigh_quotients(Q, Q.mT @ A))
    torch.testing.assert_close(found, off_diagonal(A, Q), rtol=1e-10, atol=0)
    assert staleness(A, torch.linalg.eigvalsh(A)).max() < 1e-7


def test_the_first_step_is_left_out_only_where_every_step_measures() -> None:
    """Between measurements a gradient is not in the moments that divide it: those of one gradient alone are zero in places."""
    for interval, left_out in ((1, True), (5, False)):
        model = nn.Linear(4, 3).double()
        maker: Any = from_config(model, {"method": "soap", "curvature_interval": interval})
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        maker.precondition()
        assert (float(model.weight.grad.norm()) == 0) is left_out
    with pytest.raises(ValueError, match=r"skip_first=True: .* curvature_interval=1"):
        from_config(nn.Linear(4, 3), {"method": "soap", "curvature_interval": 5, "skip_first": True})
