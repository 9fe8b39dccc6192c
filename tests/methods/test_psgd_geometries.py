"""Geometries of PSGD: every rule re-derived from its formula, where it rests, what it keeps in finite precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature.evidence import Pair
from gradmaker.representations import KronQ
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.geometries import GEOMETRIES, rotate, spectral_bound
from tests import oracles
from tests.methods.test_probes import signs, symmetric

FOLD = Fold(0.0, 1.0, 1.0)
DIRECT = ("QUAD4P", "PRO4P")
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def frame(*shape: int, diagonal: tuple[int, ...] = (), stack: int = 1, dtype: torch.dtype = torch.float64) -> Frame:
    return Frame(stack, shape, frozenset(diagonal), dtype, torch.device("cpu"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def kron(*matrices: Tensor) -> Tensor:
    return reduce(oracles.kron, matrices)


def definite(d: int, seed: int, condition: float = 10.0) -> Tensor:
    Q, _ = torch.linalg.qr(randn(d, d, seed=seed))
    return Q @ torch.diag(torch.logspace(0, -float(torch.tensor(condition).log10()), d, dtype=torch.float64)) @ Q.T


# --- the rules, written out -----------------------------------------------------------------------------------------------
def norm_from_below(A: Tensor, starts: Tensor) -> Tensor:
    """Start by start; the larger of this and the largest diagonal entry is what a positive matrix is measured by."""
    top = A.abs().max()
    if top == 0:
        return top
    A = A / top
    row = max(A, key=lambda r: float(r.norm()))
    found = []
    for v in starts:
        u = row + torch.sign(row @ v) * v
        u = u @ A @ A / (u @ A).norm()
        found.append((u @ A @ A / (u @ A).norm()).norm())
    return top * torch.stack(found).max()


def turned(Q: Tensor, starts: Tensor, longest: float, order: int) -> Tensor:
    R = Q.T - Q
    n = norm_from_below(R, starts)
    R = R / n if n > 0 else R
    rise, bend = (R @ Q).trace(), (R @ R @ Q).trace()
    a = min(float(-rise / bend), longest) if bend < 0 else longest
    U = eye(len(Q)) + a * R + a**2 / 2 * R @ R
    return (U + a**3 / 6 * R @ R @ R if order == 3 else U) @ Q


class Rederived:
    """One block of one geometry, by whole matrices and loops."""

    def __init__(self, geometry: str, shape: tuple[int, ...], diagonal: tuple[int, ...], rate: float) -> None:
        self.geometry, self.shape, self.diagonal, self.rate = geometry, shape, diagonal, rate
        self.Q = [eye(d) for d in shape]
        self.bounds = [0.0] * len(shape)
        self.started = False

    def P(self) -> Tensor:
        return kron(*(Q if self.geometry in DIRECT else Q.T @ Q for Q in self.Q))

    def slices(self, g: Tensor, axis: int) -> Tensor:
        """The axis as rows."""
        return torch.stack([g.select(axis, j).reshape(-1) for j in range(self.shape[axis])])

    def update(self, v: Tensor, h: Tensor, whitens: bool) -> None:
        if not self.started:
            start = (v.square().sum() / h.square().sum()) ** (0.5 if self.geometry in DIRECT else 0.25)
            self.Q, self.started = [Q * start ** (1 / len(self.Q)) for Q in self.Q], True
        y = (self.P() @ h.reshape(-1)).reshape(self.shape)
        if self.geometry == "EQ":
            y = (kron(*self.Q) @ h.reshape(-1)).reshape(self.shape)
            w = (torch.linalg.inv(kron(*self.Q)).T @ v.reshape(-1)).reshape(self.shape)
        else:
            w = v
        new = [self.moved(axis, self.slices(y, axis), self.slices(w, axis), v, whitens) for axis in range(len(self.shape))]
        largest = [Q.abs().max() for Q in new]
        mean = torch.stack(largest).log().mean().exp()
        self.Q = [Q * mean / top for Q, top in zip(new, largest, strict=True)]

    def moved(self, axis: int, x: Tensor, z: Tensor, v: Tensor, whitens: bool) -> Tensor:
        Q, d, c = self.Q[axis], self.shape[axis], x.shape[1]
        alone = axis in self.diagonal
        starts = self.slices(v, axis).T[:32]
        if self.geometry == "QEP":
            x, z = Q @ x, Q @ z
        t1, t2 = x @ x.T, z @ z.T
        if whitens and self.geometry == "QEP":
            t2 = c * Q @ Q.T
        elif whitens and self.geometry != "EQ":
            t2 = c * eye(d)
        if alone:
            t1, t2 = torch.diag(t1.diagonal()), torch.diag(t2.diagonal())
            size = (t1 + t2).diagonal().max()
        elif whitens and self.geometry not in ("EQ", "QEP"):
            size = torch.maximum(norm_from_below(t1, starts), t1.diagonal().max()) + c
        else:
            size = torch.maximum(norm_from_below(t1 + t2, starts), (t1 + t2).diagonal().max())
        self.bounds[axis] = max(0.9 * self.bounds[axis] + 0.1 * float(size), float(size))
        s, E = self.rate / self.bounds[axis], t1 - t2
        return self.rule(Q, s, E, starts, alone)

    def rule(self, Q: Tensor, s: float, E: Tensor, starts: Tensor, alone: bool) -> Tensor:
        one = eye(len(Q))
        if self.geometry == "EQ":
            return Q - s * torch.triu(E) @ Q
        if self.geometry == "QEQ":
            return Q - s * Q @ E
        if self.geometry in ("QUAD", "QUAD4P"):
            factor = one - (s if self.geometry == "QUAD4P" else s / 2) * E
            return factor @ Q @ factor
        new = (one - s * E) @ Q
        if self.geometry == "Q0.5EQ1.5" and not alone:
            return turned(new, starts, 1 / 8, 2)
        if self.geometry == "PRO4P" and not alone:
            for _ in range(10):
                if (new - new.T).abs().max() > 1e-3 * new.abs().max():
                    new = turned(new, starts, 1 / 3, 3)
            return (new + new.T) / 2
        return new


def stored(held: KronQ, state: dict[str, Tensor]) -> list[Tensor]:
    return [torch.diag(Q[0]) if Q.ndim == 2 else Q[0] for Q in held.held(state)]


@every_geometry
@pytest.mark.parametrize("kind", ["noise_and_gradient", "probe"])
@pytest.mark.parametrize("shape, diagonal", [((4,), ()), ((4, 3), ()), ((3, 5), (1,)), ((2, 3, 4), (0,))])
def test_thirty_steps(geometry: str, kind: Any, shape: tuple[int, ...], diagonal: tuple[int, ...]) -> None:
    held, judge = KronQ(rate=0.3, geometry=geometry), Rederived(geometry, shape, diagonal, 0.3)
    state = held.init(frame(*shape, diagonal=diagonal))
    for k in range(30):
        v, h = randn(*shape, seed=2 * k), randn(*shape, seed=2 * k + 1) * torch.linspace(0.2, 3, shape[-1]).double()
        held.update(state, Pair(v[None], h[None], kind), FOLD)
        judge.update(v, h, whitens=kind == "noise_and_gradient")
        for found, expected in zip(stored(held, state), judge.Q, strict=True):
            assert oracles.relative_error(found, expected) < 1e-10, k
    g = randn(1, *shape, seed=99)
    assert oracles.relative_error(held.apply(state, g).reshape(-1), judge.P() @ g.reshape(-1)) < 1e-10
    C = held.to_dense(state)[0]
    assert oracles.relative_error(C @ judge.P(), eye(len(C))) < 1e-9
    assert oracles.relative_error(held.matvec(state, g).reshape(-1), C @ g.reshape(-1)) < 1e-9


# --- where they rest ------------------------------------------------------------------------------------------------------
def at_rest(geometry: str, *roots: Tensor) -> list[Tensor]:
    """The factors at P = P_1 (x) P_2, in the form that the geometry keeps."""
    if geometry in DIRECT:
        return [P[None] for P in roots]
    if geometry == "EQ":
        return [torch.linalg.cholesky(P).T[None] for P in roots]
    return [oracles.matrix_power(P, 0.5)[None] for P in roots]


def mean_gaps(geometry: str, factors: list[Tensor], pairs: list[tuple[Tensor, Tensor]], whitens: bool) -> list[Tensor]:
    """E of both axes, over all pairs."""
    rule, totals = GEOMETRIES[geometry], [torch.zeros_like(Q) for Q in factors]
    for v, h in pairs:
        X, Z = rule.images(factors, v[None], h[None])
        for axis, total in enumerate(totals):
            x, z, noise = (T if axis == 0 else T.mT for T in (X, Z, v[None]))
            E, _ = rule.gap(factors[axis], x, None if whitens and not rule.triangular else z, noise.mT, x.shape[-1])
            total += E / len(pairs)
    return totals


@every_geometry
def test_the_gap_vanishes_at_the_whitening_root(geometry: str) -> None:
    """E g g^T = C_1 (x) C_2: in expectation, over all signs, nothing moves at C^(-1/2), and it does at 1.1 times that."""
    C = definite(2, 1), definite(3, 2)
    roots = [oracles.matrix_power(X, 0.5) for X in C]
    rest = at_rest(geometry, *(oracles.matrix_power(X, -0.5) for X in C))
    pairs = [
        (v.reshape(2, 3), roots[0] @ u.reshape(2, 3) @ roots[1]) for u, v in zip(signs(6), signs(6).roll(1, 0), strict=True)
    ]
    gaps = mean_gaps(geometry, rest, pairs, whitens=True)
    assert all(gap.abs().max() < 1e-12 for gap in gaps)
    away = mean_gaps(geometry, [1.1 * rest[0], rest[1]], pairs, whitens=True)
    assert all(gap.abs().max() > 1e-2 for gap in away)


@every_geometry
def test_the_gap_vanishes_at_the_absolute_inverse(geometry: str) -> None:
    """Every geometry also takes Hessian probes: h = H v with indefinite H rests at |H|^-1."""
    H = symmetric(2, 2), symmetric(3, 1)
    inverse = [oracles.matrix_power(X @ X, -0.5) for X in H]
    pairs = [(v.reshape(2, 3), H[0] @ v.reshape(2, 3) @ H[1]) for v in signs(6)]
    assert all(gap.abs().max() < 1e-11 for gap in mean_gaps(geometry, at_rest(geometry, *inverse), pairs, whitens=False))


@every_geometry
@pytest.mark.parametrize("whitens", [True, False])
def test_a_short_step_lowers_the_criterion(geometry: str, whitens: bool) -> None:
    """h^T P h + v^T P^-1 v on one axis; the second term is tr P^-1 where the rule uses its expectation."""
    rule = GEOMETRIES[geometry]
    expected = whitens and not rule.triangular

    def value(Q: Tensor) -> float:
        P = Q[0] if rule.direct else Q[0].T @ Q[0]
        inverse = torch.linalg.inv(P)
        return float(h @ P @ h + (inverse.trace() if expected else v @ inverse @ v))

    for seed in range(10):
        v, h = randn(2, 4, seed=seed)
        (Q,) = at_rest(geometry, definite(4, seed + 20))
        x, z = rule.images([Q], v[None], h[None])
        E, _ = rule.gap(Q, x.mT[None], None if expected else z.mT[None], v[None, None], 1)
        moved = rule.move(Q, E, torch.tensor([1e-5], dtype=torch.float64), v[None, None])
        assert value(moved) < value(Q)


SCHEDULE = ((0.2, 120), (0.1, 80), (0.05, 80), (0.02, 80))


def fitted(geometry: str, kind: Any, image: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The mean of P over sixteen members, each with draws of its own, and the factors of the first.

    image: h from v and from other noise of the same shape
    """
    state: Any = None
    for k, (rate, steps) in enumerate(SCHEDULE):
        held = KronQ(rate=rate, geometry=geometry)
        state = state or held.init(frame(3, 2, stack=16))
        for v, z in randn(steps, 2, 16, 3, 2, seed=k):
            held.update(state, Pair(v, image(v, z), kind), FOLD)
    return torch.linalg.inv(held.to_dense(state)).mean(0), stored(held, state)


@every_geometry
def test_whitens_kronecker_data(geometry: str) -> None:
    """Property 36: g = C_1^(1/2) Z C_2^(1/2), P -> C^(-1/2) with a rate that falls."""
    C = definite(3, 1, 30.0), definite(2, 2)
    roots = [oracles.matrix_power(X, 0.5) for X in C]
    P, factors = fitted(geometry, "noise_and_gradient", lambda v, z: roots[0] @ z @ roots[1])
    exact = oracles.matrix_power(kron(*C), -0.5)
    assert oracles.relative_error(P, exact) < 0.05
    if geometry in DIRECT:  # what is held is P itself
        assert oracles.relative_error(kron(*factors), exact) < 0.2


@every_geometry
def test_fits_the_absolute_inverse(geometry: str) -> None:
    """The Newton form on an indefinite Kronecker Hessian ends at |H|^-1."""
    H = symmetric(3, 4), symmetric(2, 5)
    P, _ = fitted(geometry, Pair, lambda v, z: H[0] @ v @ H[1])
    assert oracles.relative_error(P, kron(*(oracles.matrix_power(X @ X, -0.5) for X in H))) < 0.05


# --- norms and rotations --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d", [2, 16, 128, 256])
def test_the_norm_is_bounded_from_below(d: int) -> None:
    """Property 38: never above |A|_2, not far below it on random matrices, exact for rank one."""
    X = randn(d, d, seed=1)
    Q, _ = torch.linalg.qr(X)
    kinds = {
        "wishart": X @ X.T,
        "flat": Q @ torch.diag(torch.linspace(0.8, 1.0, d, dtype=torch.float64)) @ Q.T,
        "rank 3": X[:, :3] @ X[:, :3].T,
        "rank 1": X[:, :1] @ X[:, :1].T,
        "skew": X - X.T,
        "diagonal": torch.diag(X[0].abs()),
    }
    for name, A in kinds.items():
        true = float(torch.linalg.matrix_norm(A, 2))
        for scale in (1e-30, 1.0, 1e30):
            found = float(spectral_bound((scale * A)[None], randn(1, 32, d, seed=2)))
            assert found <= true * scale * (1 + 1e-12)
            assert found >= (1 - 1e-12 if name == "rank 1" else 0.8) * true * scale, name
    assert float(spectral_bound(torch.zeros(1, d, d, dtype=torch.float64), randn(1, 32, d))) == 0


@pytest.mark.parametrize("longest, order, drift", [(1 / 8, 2, 2e-3), (1 / 3, 3, 2e-2)])
def test_rotations_end_at_a_symmetric_factor(longest: float, order: int, drift: float) -> None:
    """exp(a R) Q: P = Q^T Q stays, up to the end of the series; Q becomes its positive root. A reflection is out of reach."""
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -2.0, 0.3], [2.0, 0.0, 0.5], [-0.3, -0.5, 0.0]], dtype=torch.float64))
    root = definite(3, 1)
    root = (root + root.T) / 2  # to the last bit, on any machine
    Q = (turn @ root)[None]
    traces = []
    for k in range(60):
        Q = rotate(Q, randn(1, 8, 3, seed=k), longest, order)
        traces.append(float(Q[0].trace()))
    assert oracles.relative_error(Q[0], Q[0].T) < 1e-6
    assert torch.linalg.eigvalsh((Q[0] + Q[0].T) / 2)[0] > 0
    assert oracles.relative_error(Q[0].T @ Q[0], root @ root) < drift
    assert traces[-1] > traces[0] and max(traces) < float(root.trace()) * (1 + drift)
    assert torch.equal(rotate(root[None], randn(1, 8, 3), longest, order)[0], root)  # nothing to turn


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"geometry='EP': expected EQ, QEP, .*PRO4P"):
        KronQ(geometry="EP")
    for name in GEOMETRIES:
        if name == "EQ":
            KronQ(geometry=name, normaliser="max")
        else:
            with pytest.raises(ValueError, match="enough for a triangular factor"):
                KronQ(geometry=name, normaliser="max")
