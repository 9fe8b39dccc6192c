"""PSGD: the gradient of its criterion, where it rests, what its steps keep, and the methods on top."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import METHODS
from gradmaker.curvature.evidence import Pair
from gradmaker.representations import KronQ, TriangularQ, lie
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.lie import relative_gradient
from tests import models, oracles
from tests.methods.test_probes import quadratic, signs, step, symmetric

FOLD = Fold(0.0, 1.0, 1.0)
NORMALISERS = ("slow", "max")


def frame(*shape: int, diagonal: tuple[int, ...] = (), stack: int = 1) -> Frame:
    return Frame(stack, shape, frozenset(diagonal), torch.float64, torch.device("cpu"))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def absolute(H: Tensor, power: float = 1.0) -> Tensor:
    s, Q = torch.linalg.eigh(H)
    return (Q * s.abs() ** power) @ Q.mT


def upper_root(P: Tensor) -> Tensor:
    """Q, upper triangular with a positive diagonal, Q^T Q = P."""
    return torch.linalg.cholesky(P).mT


def criterion(P: Tensor, v: Tensor, h: Tensor) -> Tensor:
    v, h = v.reshape(-1), h.reshape(-1)
    return h @ P @ h + v @ torch.linalg.solve(P, v)


def inverse_of(held: Any, state: dict[str, Tensor]) -> Tensor:
    """P of the only member."""
    return torch.linalg.inv(held.to_dense(state)[0])


# --- the gradient -----------------------------------------------------------------------------------------------------------
def test_gradient_of_the_criterion() -> None:
    """c((I + eE) Q) by central differences = 2 <E, triu(aa^T - bb^T)> for upper triangular E (1e-8)."""
    Q = torch.triu(randn(5, 5)) + 3 * torch.eye(5, dtype=torch.float64)
    v, h = randn(5, seed=1), randn(5, seed=2)
    a, b = Q @ h, torch.linalg.solve(Q.mT, v)
    G = 2 * relative_gradient(a[None, :, None], b[None, :, None])[0]
    assert torch.equal(G, G.triu())
    for seed in range(5):
        E = torch.triu(randn(5, 5, seed=seed + 3))
        sides = [criterion(R.mT @ R, v, h) for R in (Q + 1e-5 * E @ Q, Q - 1e-5 * E @ Q)]
        assert abs(float((sides[0] - sides[1]) / 2e-5 - (E * G).sum())) < 1e-7


@pytest.mark.parametrize("diagonal", [(), (1,), (0, 2), (0, 1, 2)])
def test_step_is_along_the_gradient_of_each_factor(diagonal: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step at a tiny rate, axis by axis, against the criterion's differences: dense and diagonal sides (2.4)."""
    monkeypatch.setattr(lie, "_balance", lambda factors: None)  # would hide a tiny step behind a change of scale
    held, shape = KronQ(rate=1e-7, normaliser="max"), (3, 4, 2)
    state = held.init(frame(*shape, diagonal=diagonal))
    v, h = randn(1, *shape, seed=1), randn(1, *shape, seed=2)
    state["age"].fill_(1)
    for axis, Q in enumerate(held.held(state)):
        Q.copy_(Q + 0.3 * (randn(*Q.shape[1:], seed=axis).triu() if Q.ndim == 3 else randn(*Q.shape[1:]).abs()))
    before = [Q.clone() for Q in held.held(state)]

    def value(factors: list[Tensor]) -> float:
        dense = [torch.diag(Q[0]) if Q.ndim == 2 else Q[0] for Q in factors]
        P = [R.mT @ R for R in dense]
        return float(criterion(torch.kron(torch.kron(P[0], P[1]), P[2]), v, h))

    start = {name: x.clone() for name, x in state.items()}
    after = held.held(held.fitted(start, v, h))
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        E = (new - old) / old if old.ndim == 2 else torch.linalg.solve(old, new - old, left=False)
        size = 1e-5
        moved = [
            [
                (Q + s * (E / E.norm() @ Q if Q.ndim == 3 else E / E.norm() * Q)) if k == axis else Q
                for k, Q in enumerate(before)
            ]
            for s in (size, -size)
        ]
        slope = (value(moved[0]) - value(moved[1])) / (2 * size)
        x = oracles_mode(before, h, axis)
        z = oracles_mode([1 / Q if Q.ndim == 2 else torch.linalg.inv(Q).mT for Q in before], v, axis)
        G = 2 * (x.square().sum(1) - z.square().sum(1)) if old.ndim == 2 else 2 * torch.triu(x @ x.mT - z @ z.mT)
        assert slope == pytest.approx(float(((E / E.norm())[0] * G).sum()), rel=1e-4)
        assert float(torch.cosine_similarity(E.reshape(-1), -G.reshape(-1), dim=0)) > 1 - 1e-4


def oracles_mode(factors: list[Tensor], g: Tensor, axis: int) -> Tensor:
    """mat_axis of g with every factor applied along its axis."""
    dense = [torch.diag(Q[0]) if Q.ndim == 2 else Q[0] for Q in factors]
    out = torch.einsum("ai,bj,ck,ijk->abc", *dense, g[0])
    return out.movedim(axis, 0).reshape(out.shape[axis], -1)


# --- where it rests ---------------------------------------------------------------------------------------------------------
def test_rests_at_the_absolute_inverse() -> None:
    """P = |H|^-1 for an indefinite H: the gradient vanishes in expectation, over all signs, which have the unit covariance."""
    H = symmetric(4)
    Q = upper_root(absolute(H, -1.0))
    total = torch.zeros(4, 4, dtype=torch.float64)
    for v in signs(4):
        total += relative_gradient((Q @ H @ v)[None, :, None], torch.linalg.solve(Q.mT, v)[None, :, None])[0] / 16
    assert total.abs().max() < 1e-12
    noisy = H @ H + 0.3 * torch.eye(4, dtype=torch.float64)  # h = H v + noise: P = (H^2 + N)^(-1/2)
    Q = upper_root(oracles.matrix_power(noisy, -0.5))
    b = torch.linalg.inv(Q).mT
    assert relative_gradient((Q @ oracles.matrix_power(noisy, 0.5))[None], b[None]).abs().max() < 1e-12


def test_kronecker_rests_at_the_absolute_inverses() -> None:
    """H = H_1 (x) H_2: both gradients vanish at |H_1|^-1 (x) |H_2|^-1 (1e-12)."""
    H1, H2 = symmetric(3, 1), symmetric(2, 2)
    Q = [upper_root(absolute(H, -1.0)) for H in (H1, H2)]
    sums = [torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)]
    for flat in signs(6):
        V = flat.reshape(3, 2)
        A, Z = Q[0] @ (H1 @ V @ H2) @ Q[1].mT, torch.linalg.inv(Q[0]).mT @ V @ torch.linalg.inv(Q[1])
        sums[0] += relative_gradient(A[None], Z[None])[0] / 64
        sums[1] += relative_gradient(A.mT[None], Z.mT[None])[0] / 64
    assert all(s.abs().max() < 1e-12 for s in sums)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_one_dimension_converges(normaliser: Any) -> None:
    state = TriangularQ().init(frame(1))
    state["age"].fill_(1)  # from one, not from the first pair's scale
    for rate in (0.1, 1e-2, 1e-3, 1e-4, 1e-5):
        for v in [1.0, -1.0] * 50:
            pair = Pair(torch.tensor([[v]]).double(), torch.tensor([[-5.0 * v]]).double())
            TriangularQ(rate, normaliser).update(state, pair, FOLD)
    assert float(state["factor"].square()) == pytest.approx(1 / 5, rel=1e-4)


@pytest.mark.parametrize("make, shape, stated", [(TriangularQ, (4,), 0.02), (KronQ, (2, 2), 0.007)])
def test_fits_the_absolute_inverse(make: Any, shape: tuple[int, ...], stated: float) -> None:
    """Property 36 for an indefinite quadratic, with a rate that falls.

    The mean error of sixteen fits, each on probes of its own.
    """
    H, state = oracles.kron(symmetric(2, 2), symmetric(2, 1)), make().init(frame(*shape, stack=16))
    for k, rate in enumerate((0.1, 0.03, 0.01, 0.003, 0.001)):
        held = make(rate)
        for v in randn(1000, 16, 4, seed=k):
            held.update(state, Pair(v.view(16, *shape), (v @ H).view(16, *shape)), FOLD)
    exact = absolute(H, -1.0)
    errors = [oracles.relative_error(P, exact) for P in torch.linalg.inv(make().to_dense(state))]
    assert sum(errors) / 16 < stated


def test_whitens() -> None:
    """Independent noise against g = C^(1/2) z: P = C^(-1/2)."""
    C = oracles.kron(symmetric(2, 2) @ symmetric(2, 2), symmetric(2, 1) @ symmetric(2, 1)) + 0.1 * torch.eye(4).double()
    root, state = oracles.matrix_power(C, 0.5), TriangularQ().init(frame(4))
    for k, rate in enumerate((0.1, 0.03, 0.01, 0.003)):
        for v, z in randn(1500, 2, 4, seed=k):
            TriangularQ(rate).update(state, Pair(v[None], (root @ z)[None], "noise_and_gradient"), FOLD)
    assert oracles.relative_error(inverse_of(TriangularQ(), state), oracles.matrix_power(C, -0.5)) < 0.12


# --- what steps keep --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("diagonal", [(), (0,)])
def test_stays_triangular_positive_and_finite(normaliser: Any, diagonal: tuple[int, ...]) -> None:
    """Property 38: 1000 random pairs of wild scales; an infinite one and a zero one change nothing that matters."""
    for held, shape in ((TriangularQ(0.5, normaliser), (6,)), (KronQ(0.5, normaliser), (3, 2))):
        state = held.init(frame(*shape, diagonal=diagonal if len(shape) > 1 else (), stack=2))
        for k in range(1000):
            v, h = randn(2, 2, *shape, seed=k)
            held.update(state, Pair(v, h * 10.0 ** (k % 13 - 6)), FOLD)
        before = {name: x.clone() for name, x in state.items()}
        held.update(state, Pair(v, torch.full_like(h, torch.inf)), FOLD)
        assert all(torch.equal(x, before[name]) for name, x in state.items())
        for Q in held.held(state):
            assert Q.isfinite().all() and (Q if Q.ndim == 2 else Q.diagonal(dim1=1, dim2=2)).min() > 0
            assert Q.ndim == 2 or torch.equal(Q, Q.triu())
        if normaliser == "slow":
            P = inverse_of(held, state)
            assert torch.linalg.eigvalsh((P + P.mT) / 2)[0] > 0


def test_two_products_and_the_dense_matrix_agree() -> None:
    for held, shape, diagonal in (
        (TriangularQ(), (5,), ()),
        (KronQ(), (3, 2), ()),
        (KronQ(), (3, 2), (1,)),
        (KronQ(), (2, 3, 2), (0,)),
    ):
        state = held.init(frame(*shape, diagonal=diagonal, stack=2))
        for k in range(5):
            held.update(state, Pair(*randn(2, 2, *shape, seed=k)), FOLD)
        C, g = held.to_dense(state), randn(2, *shape, seed=9)
        flat = g.reshape(2, -1, 1)
        assert oracles.relative_error(held.apply(state, g), torch.linalg.solve(C, flat).reshape(g.shape)) < 1e-9
        assert oracles.relative_error(held.matvec(state, g), (C @ flat).reshape(g.shape)) < 1e-9


def test_step_of_the_whole_is_the_product() -> None:
    """The running sums against triu(aa^T - bb^T) Q with whole matrices."""
    held = TriangularQ(0.1, "max")
    state = held.init(frame(5))
    held.update(state, Pair(*randn(2, 1, 5)), FOLD)
    Q = state["factor"].clone()
    v, h = randn(2, 1, 5, seed=4)
    held.update(state, Pair(v, h), FOLD)
    a, b = Q[0] @ h[0], torch.linalg.solve(Q[0].mT, v[0])
    E = torch.triu(torch.outer(a, a) - torch.outer(b, b))
    assert oracles.relative_error(state["factor"][0], Q[0] - 0.1 / E.abs().max() * E @ Q[0]) < 1e-12


def test_one_axis_is_the_full_form() -> None:
    """A vector has one axis: the same factor, step for step."""
    one, other = TriangularQ(0.1, "max"), KronQ(0.1, "max")
    first, second = one.init(frame(5)), other.init(frame(5))
    for k in range(20):
        pair = Pair(*randn(2, 1, 5, seed=k))
        one.update(first, pair, FOLD)
        other.update(second, pair, FOLD)
    assert oracles.relative_error(second["factor_0"], first["factor"]) < 1e-12


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("method", ["psgd", "psgd_kf"])
def test_scale_of_the_loss(method: str, normaliser: str) -> None:
    """Loss x c: Q x c^(-1/2) on the same trajectory, so P g stays."""
    found = []
    for c in (1.0, 64.0):
        case = models.mlp()
        scaled = case._replace(loss=lambda y, t, c=c, case=case: c * case.loss(y, t))
        maker: Any = METHODS[method](case.model, METHODS[method].Config(normaliser=normaliser, damping=0.0))
        for _ in range(6):
            step(maker, scaled)
        found.append(oracles.gradient_vector(case.model))
    assert oracles.relative_error(*found) < 1e-9


@pytest.mark.parametrize("whiten", [True, False])
def test_tiny_gradients_leave_a_bounded_inverse(whiten: bool) -> None:
    """Property 39: P stays below 1 / damping, because noise is added to what is fitted. Zero ones say nothing."""
    case, zero = (quadratic(scale * torch.eye(3, dtype=torch.float64)) for scale in (1e-12, 0.0))
    for method in ("psgd", "psgd_kf"):
        maker: Any = METHODS[method](case.model, METHODS[method].Config(damping=1e-3, whiten=whiten))
        for _ in range(50):
            step(maker, case)
        (block,) = maker.plan.blocks
        P = inverse_of(block.triple.representation, block.state)
        assert P.isfinite().all() and 0.05 / 1e-3 < torch.linalg.eigvalsh((P + P.mT) / 2)[-1] < 20 / 1e-3
        idle: Any = METHODS[method](zero.model, METHODS[method].Config(damping=1e-3, whiten=whiten))
        before = {name: x.clone() for name, x in idle.plan.blocks[0].state.items()}
        step(idle, zero)
        assert all(torch.equal(x, before[name]) for name, x in idle.plan.blocks[0].state.items())


def test_long_axes_get_diagonals() -> None:
    assert KronQ(max_skew=1.0).long_axes((3, 5), 100) == {1} and KronQ(max_skew=1.0).long_axes((4, 4), 100) == frozenset()
    assert KronQ().long_axes((3, 5), 4) == {1} and KronQ().long_axes((3, 5), 100) == frozenset()


def test_bad_options_are_refused() -> None:
    for make, bad in itertools.product(
        (TriangularQ, KronQ), ({"rate": 0.0}, {"rate": 1.0}, {"normaliser": "none"}, {"granularity": "unit"})
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_skew"):
        KronQ(max_skew=-1.0)
    with pytest.raises(ValueError, match="max_dim"):
        METHODS["psgd"](models.mlp().model, METHODS["psgd"].Config(max_dim=10))
