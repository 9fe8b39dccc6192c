"""CASPR's theory on the library's own operators: the Loewner chain, nearest axis statistics, monotonicity, traces.

With ``L + eps I`` and ``R + eps I``: Shampoo <= X(16) <= X(4) <= X(2) <= X(1) <= sqrt(r) (A + r eps I)^(-1/2), ``A`` the sum
of ``g g^T``, ``r`` the largest rank of an unfolded gradient. `tests/methods/test_caspr.py` has it for relative ridges.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.capture.shapes import ShapePolicy
from gradmaker.curvature import Gradient
from gradmaker.representations import Dense, KronDims, KronSum
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import AxisMean, Eigh
from tests import oracles
from tests.kronecker_reference import on_axis, unfolded
from tests.methods.test_kronecker_dims import gradients

SUM, EPS, INF = Fold(1.0, 1.0, 1.0, summed=True), 1e-3, "inf"
POWERS: tuple[Any, ...] = (INF, 16, 4, 2, 1)
KINDS = ["iid", "kronecker", "rank_2", "commuting", "additive"]


# --- problems -------------------------------------------------------------------------------------------------------------
def problem(kind: str, shape: tuple[int, ...], seed: int, steps: int = 6) -> list[Tensor]:
    noise, other = gradients(*shape, steps=steps, seed=seed), gradients(*shape, steps=steps, seed=seed + 1000)
    roots = []
    for k, d in enumerate(shape):
        Q = torch.linalg.qr(gradients(d, d, steps=1, seed=seed + k)[0])[0]
        roots.append(Q * torch.logspace(0, -2, d, dtype=torch.float64) @ Q.T)
    if kind == "iid":
        return noise
    if kind == "kronecker":
        for k, A in enumerate(roots):
            noise = [on_axis(A, g, k) for g in noise]
        return noise
    if kind == "rank_2":
        return [rank_two(shape, seed + 10 * t) for t in range(steps)]
    if kind == "commuting":
        return [diagonal(shape, 1.0 + 0.3 * ((t + torch.arange(min(shape))) % 3)) for t in range(steps)]
    return [on_axis(roots[0], g, 0) + on_axis(roots[1], h, 1) for g, h in zip(noise, other, strict=True)]


def rank_two(shape: tuple[int, ...], seed: int) -> Tensor:
    """The sum of two outer products of vectors."""
    total = torch.zeros(shape, dtype=torch.float64)
    for j in range(2):
        term = torch.ones((), dtype=torch.float64)
        for k, d in enumerate(shape):
            term = torch.tensordot(term, gradients(d, steps=1, seed=seed + 7 * j + k)[0], dims=0)
        total += term
    return total


def diagonal(shape: tuple[int, ...], values: Tensor) -> Tensor:
    g = torch.zeros(shape, dtype=torch.float64)
    for j, v in enumerate(values):
        g[(j,) * len(shape)] = v
    return g


# --- operators ------------------------------------------------------------------------------------------------------------
def parts(p: Any, eps: float) -> tuple[Any, Any]:
    if p == INF:
        return KronDims(), Eigh(power=-0.5, damping=eps, split="each", mode="absolute")
    return KronSum(p), AxisMean(damping=eps, mode="absolute")


def empty(representation: Any, shape: tuple[int, ...]) -> Any:
    return representation.init(Frame(1, shape, frozenset(), torch.float64, torch.device("cpu")))


def summed(representation: Any, steps: list[Tensor]) -> Any:
    """The state after all gradients."""
    state = empty(representation, tuple(steps[0].shape))
    for g in steps:
        representation.update(state, Gradient(g.unsqueeze(0)), SUM)
    return state


def operators(p: Any, steps: list[Tensor], eps: float = EPS, fold: Fold = SUM) -> Iterator[Tensor]:
    """The preconditioner after each gradient, by the solver's dense definition; p = inf is Shampoo."""
    representation, solver = parts(p, eps)
    state = empty(representation, tuple(steps[0].shape))
    for g in steps:
        representation.update(state, Gradient(g.unsqueeze(0)), fold)
        yield solver.operator(representation, state)[0]


def operator(p: Any, steps: list[Tensor], eps: float = EPS) -> Tensor:
    """After the last gradient."""
    representation, solver = parts(p, eps)
    return solver.operator(representation, summed(representation, steps))[0]


def full_matrix(steps: list[Tensor], ridge: float) -> Tensor:
    """``(A + ridge I)^(-1/2)``, by the library's full-matrix AdaGrad."""
    representation, solver = Dense(granularity="layer"), Eigh(power=-0.5, damping=ridge, split="exact", mode="absolute")
    return solver.operator(representation, summed(representation, [g.reshape(1, -1) for g in steps]))[0]


def rank(steps: list[Tensor]) -> int:
    return max(int(torch.linalg.matrix_rank(unfolded(g, k))) for g in steps for k in range(g.ndim))


def merged(steps: list[Tensor]) -> list[Tensor]:
    """As ``merge='to_2d'`` does; the order of elements stays."""
    (view,) = ShapePolicy("to_2d").views(tuple(steps[0].shape))
    return [g.reshape(view.merged) for g in steps]


def smallest(A: Tensor) -> float:
    assert oracles.relative_error(A, A.T) < 1e-10 or A.norm() < 1e-10
    return float(torch.linalg.eigvalsh((A + A.T) / 2)[0])


# --- the chain ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, merge", [((4, 3), False), ((2, 3, 3), False), ((2, 3, 3), True)])
def test_the_loewner_chain(shape: tuple[int, ...], merge: bool, kind: str) -> None:
    for seed in range(5):
        steps = problem(kind, shape, seed)
        steps = merged(steps) if merge else steps
        assert steps[0].ndim == (2 if merge else len(shape))
        r = rank(steps)
        assert r <= 2 or kind != "rank_2"
        chain = [operator(p, steps) for p in POWERS] + [r**0.5 * full_matrix(steps, r * EPS)]
        size = float(torch.linalg.matrix_norm(chain[-1], 2))
        for low, high in pairwise(chain):
            assert smallest(high - low) >= -1e-10 * size
        for low, high in pairwise(chain[:-1]):  # strictly, unless the axes agree
            assert float((high - low).trace()) > (0.0 if kind == "commuting" else 1e-8 * size)


def test_the_last_link_needs_the_rank() -> None:
    """Commuting gradients: false without sqrt(r), and sqrt(r) is the least factor that does."""
    steps = [torch.eye(3, dtype=torch.float64)] * 4
    bare = full_matrix(steps, 3 * EPS)
    assert smallest(bare - operator(1, steps)) < -1e-4
    assert smallest(3**0.5 * bare - operator(1, steps)) > -1e-12
    assert smallest((1 - 1e-6) * 3**0.5 * bare - operator(1, steps)) < -1e-8
    varied = problem("commuting", (3, 3), 0)
    assert smallest(full_matrix(varied, 3 * EPS) - operator(1, varied)) < -1e-4


@pytest.mark.parametrize("p", [1, 2, 16])
def test_equality_with_shampoo_where_the_axes_agree(p: int) -> None:
    """X(2) - Shampoo is ((A - B) / 2)^2: nothing where L = R = a I, something where only their scales differ."""
    square = [2.0 * torch.linalg.qr(g)[0] for g in gradients(3, 3, steps=4)]
    assert oracles.relative_error(operator(p, square), operator(INF, square)) < 1e-12
    wide = [torch.linalg.qr(g.T)[0].T for g in gradients(3, 3, steps=4)]
    uneven = [torch.cat([g, g, g], 1) for g in wide]  # L = 12 I, R of rank three
    assert oracles.relative_error(operator(p, uneven), operator(INF, uneven)) > 1e-2


# --- Lemma 3.1 ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_axis_statistics_are_nearest(axis: int, kind: str) -> None:
    """argmin |A - L (x) I|^2 is sum G G^T / n, argmin |A - I (x) R|^2 is sum G^T G / m: 200 perturbations of the library's."""
    shape = (4, 3)
    steps = problem(kind, shape, 3)
    A = torch.stack([torch.outer(g.flatten(), g.flatten()) for g in steps]).sum(0)
    other = torch.eye(shape[1 - axis], dtype=torch.float64)
    H = KronDims().factors(summed(KronDims(), steps))[axis][0] / len(other)

    def distance(S: Tensor) -> float:
        return float((A - (oracles.kron(S, other) if axis == 0 else oracles.kron(other, S))).square().sum())

    best = distance(H)
    for E in gradients(shape[axis], shape[axis], steps=200, seed=7):
        E = 1e-2 * H.norm() * (E + E.T) / (E + E.T).norm()
        assert distance(H + E) - best == pytest.approx(len(other) * float(E.square().sum()), rel=1e-6)
    blocks = A.reshape(*shape, *shape)
    tied = [blocks[:, j, :, j] if axis == 0 else blocks[j, :, j, :] for j in range(len(other))]
    torch.testing.assert_close(H, torch.stack(tied).mean(0))  # the unit-wise blocks, all made one


# --- traces and time ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3)])
def test_the_bound_on_regret_is_below_shampoos(shape: tuple[int, ...], kind: str) -> None:
    """tr(X^-1), to which the regret is proportional, falls from Shampoo to X(1)."""
    for seed in range(5):
        steps = problem(kind, shape, seed, steps=12)
        traces = [float(torch.linalg.inv(operator(p, steps)).trace()) for p in POWERS]
        for above, below in pairwise(traces):
            assert below <= above * (1 + 1e-12)


@pytest.mark.parametrize("spread, ratios", [(0.0, (0.998, 0.996)), (2.0, (0.93, 0.88)), (4.0, (0.84, 0.76))])
def test_how_far_below(spread: float, ratios: tuple[float, float]) -> None:
    """tr(X(2)^-1) and tr(X(1)^-1) over Shampoo's, by the condition 1, 1e2, 1e4 of the factors."""
    found = []
    for seed in range(5):
        steps = gradients(6, 5, steps=60, seed=seed)
        for k, d in enumerate((6, 5)):
            steps = [on_axis(torch.diag(torch.logspace(0, -spread / 2, d, dtype=torch.float64)), g, k) for g in steps]
        one, two, shampoo = (float(torch.linalg.inv(operator(p, steps, 1e-9)).trace()) for p in (1, 2, INF))
        found.append((two / shampoo, one / shampoo))
    for expected, values in zip(ratios, zip(*found, strict=True), strict=True):
        assert sum(values) / len(values) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_it_falls_in_time_where_statistics_are_summed(p: int, kind: str) -> None:
    """At each of 40 steps, on which the proof of the regret rests."""
    found = operators(p, problem(kind, (4, 3), 1, steps=40))
    for older, newer in pairwise(found):
        assert smallest(older - newer) >= -1e-10 * float(torch.linalg.matrix_norm(older, 2))


def test_every_term_falls() -> None:
    """L^(-1/2) (x) I, L^(-1/4) (x) R^(-1/4) and I (x) R^(-1/2), of which X(2) is the sum."""
    steps = problem("kronecker", (4, 3), 2, steps=40)
    terms: list[list[Tensor]] = []
    eye = [torch.eye(d, dtype=torch.float64) for d in (4, 3)]
    L, R = EPS * eye[0], EPS * eye[1]
    for g in steps:
        L, R = L + g @ g.T, R + g.T @ g
        root = {q: (oracles.matrix_power(L, -1 / q), oracles.matrix_power(R, -1 / q)) for q in (2, 4)}
        terms.append([oracles.kron(root[2][0], eye[1]), oracles.kron(*root[4]), oracles.kron(eye[0], root[2][1])])
    assert oracles.relative_error(operator(2, steps), (terms[-1][0] + 2 * terms[-1][1] + terms[-1][2]) / 4) < 1e-10
    for older, newer in pairwise(terms):
        for before, after in zip(older, newer, strict=True):
            assert smallest(before - after) >= -1e-10 * float(torch.linalg.matrix_norm(before, 2))


def test_averages_do_not_fall() -> None:
    """And so the bound is that of decay=None alone."""
    steps = problem("iid", (4, 3), 1, steps=40)
    found = operators(2, [0.9**t * g for t, g in enumerate(steps)], fold=Fold(0.9, 0.1, 0.1))
    falls = [smallest(older - newer) for older, newer in pairwise(found)]
    assert sum(f < -1e-3 for f in falls) > 30
