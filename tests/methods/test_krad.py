"""KrADagrad and KL-Shampoo: whole runs, domination of the exact inverse, the array form, the KL fixed point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import from_config
from gradmaker.curvature import Gradient
from gradmaker.representations import AlternatingInverse, CrossDims, InverseDims
from gradmaker.representations.alternating_inverse import scheduled_axis
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.inverse_arrays import array_update_
from gradmaker.representations.inverse_dims import krad_update
from gradmaker.solvers import PositiveRoot
from tests import models, oracles
from tests.kronecker_reference import Reference, on_axis, unfolded
from tests.methods.test_kronecker_dims import SCHEDULE, convolution, gradients, run
from tests.methods.test_trajectories import compare
from tests.refreshing import follow

CPU = torch.device("cpu")


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def power(A: Tensor, p: float) -> Tensor:
    s, Q = torch.linalg.eigh((A + A.T) / 2)
    out: Tensor = (Q * s.clamp(min=0) ** p) @ Q.T
    return out


class Star:
    """The inverse by a dense inverse for ``exact``, by ``L - L S L / den`` otherwise."""

    def __init__(self, den: str, ridge: float, decay: float | None, relative: bool = True, published: bool = False) -> None:
        self.den, self.ridge, self.decay, self.relative, self.published = den, ridge, decay, relative, published
        self.L: list[Tensor] = []

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        S = [unfolded(g, k) @ unfolded(g, k).T for k in range(g.ndim)]
        if not self.L:
            self.L = [eye(len(s)) / (self.ridge * (s.trace() / len(s) if self.relative else 1.0)) for s in S]
        weight = 1.0 if self.decay is None or self.published else 1 - self.decay
        self.L = [self.updated(L / (self.decay or 1.0), weight * s) for L, s in zip(self.L, S, strict=True)]
        for axis, L in enumerate(self.L):
            m = on_axis(power(L + (1e-8 * eye(len(L)) if self.published else 0), 1 / (2 * g.ndim)), m, axis)
        return m

    def updated(self, L: Tensor, S: Tensor) -> Tensor:
        if self.den == "exact":
            return torch.linalg.inv(torch.linalg.inv(L) + S)
        size = {"tr": (L @ S).trace(), "fro": (S @ L).norm(), "op": torch.linalg.eigvals(L @ S).abs().max()}
        den = len(L) * (1 + size["tr"]) if self.den == "d-tr" else 1 + size[self.den]
        return L - L @ S @ L / den


class Alternating:
    """KrADagrad's step as published, with the division that keeps ``L`` positive."""

    def __init__(self, eps: float, T: int, start: float | None, decay: float | None) -> None:
        self.eps, self.T, self.start, self.decay, self.t = eps, T, start, decay, 0
        self.L: list[Tensor] = []
        self.P: list[Tensor] = []
        self.touched: set[int] = set()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        k = g.ndim
        if not self.L:
            scale = 1.0 if self.start is None else float(self.start * g.square().mean()) ** (-1 / k)
            self.L = [scale * eye(d) for d in g.shape]
            self.P = [scale**0.5 * eye(d) for d in g.shape]
        j = self.turn(k, tuple(g.shape))
        Gw = g
        for axis in range(k):
            Gw = on_axis(self.P[axis], Gw, axis) if axis != j else Gw
        L = self.L[j] / (self.decay or 1.0)
        if self.eps:
            L = L - self.eps * L @ L / (1 + self.eps * L.abs().sum(1).max())
        Y = L @ unfolded(Gw, j) @ unfolded(Gw, j).T
        self.L[j] = L - Y @ L / (1 + Y.norm())
        self.renew(j)
        for axis in range(k):
            m = on_axis(self.P[axis], m, axis)
        return m

    def renew(self, j: int) -> None:
        self.touched.add(j)
        if self.t % self.T == 0:
            for axis in self.touched:
                self.P[axis] = power(self.L[axis], 0.5)
            self.touched = set()
        self.t += 1

    def turn(self, k: int, shape: tuple[int, ...]) -> int:
        if self.t < k**2:
            return self.t % k
        e = self.t - int(self.t**0.5) ** 2
        return e if e < k else shape.index(max(shape))


class Release(Alternating):
    """The authors' loop: ``.grad`` becomes ``G_w``, roots are renewed, and ``P_j`` alone is multiplied on from the start on."""

    def __init__(self, eps: float, T: int, decay: float | None, start_step: int) -> None:
        super().__init__(eps, T, None, decay)
        self.start_step = start_step

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        if not self.L:
            self.L, self.P = ([eye(d) for d in g.shape] for _ in range(2))
        j = self.turn(g.ndim, tuple(g.shape))
        for axis in range(g.ndim):
            g = on_axis(self.P[axis], g, axis) if axis != j else g
        L = self.L[j] / (self.decay or 1.0)
        L = L - self.eps * L @ L.T
        Y = L @ unfolded(g, j) @ unfolded(g, j).T
        self.L[j] = L - Y @ L.T / (1 + Y.norm())
        self.renew(j)
        return on_axis(self.P[j], g, j) if step >= self.start_step else g


class Kl:
    """The other factors' inverses on the right, both as of the last refresh; equal average eigenvalues at a refresh."""

    def __init__(self, b: float, T: int) -> None:
        self.b, self.T, self.t = b, T, 0
        self.S: list[Tensor] = []
        self.W: list[Tensor] = []

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        if not self.S:
            self.S = [0.1 * eye(d) for d in g.shape]
            self.W = [0.1**-0.5 * eye(d) for d in g.shape]
        for axis, d in enumerate(g.shape):
            whitened = g
            for k, W in enumerate(self.W):
                whitened = on_axis(W, whitened, k) if k != axis else whitened
            x = unfolded(whitened, axis)
            self.S[axis] = self.b * self.S[axis] + (1 - self.b) * (d / g.numel()) * x @ x.T
        if self.t % self.T == 0:
            means = [S.diagonal().mean() for S in self.S]
            common = torch.stack(means).prod() ** (1 / len(means))
            self.S = [S * common / mean for S, mean in zip(self.S, means, strict=True)]
            self.W = [power(torch.linalg.inv(S), 0.5) for S in self.S]
        self.t += 1
        for axis, W in enumerate(self.W):
            m = on_axis(W, m, axis)
        return m


STAR: dict[str, tuple[Any, Any, dict[str, Any], float]] = {
    "exact": (models.mlp, lambda: Star("exact", 1e-4, None), {"damping": 1e-4}, 0.1),
    "exact_average": (models.mlp, lambda: Star("exact", 1e-3, 0.9), {"damping": 1e-3, "decay": 0.9, "grafting": "none"}, 0.01),
    "exact_order_4": (convolution, lambda: Star("exact", 1e-3, None), {"damping": 1e-3, "grafting": "adam"}, 0.01),
    "tr": (models.mlp, lambda: Star("tr", 1e-3, None), {"damping": 1e-3, "denominator": "tr", "grafting": "none"}, 0.01),
    "fro": (models.mlp, lambda: Star("fro", 1e-3, 0.9), {"damping": 1e-3, "denominator": "fro", "decay": 0.9}, 0.1),
    "d_tr": (models.mlp, lambda: Star("d-tr", 1e-3, None), {"damping": 1e-3, "denominator": "d-tr", "block_size": 3}, 0.1),
    "compat": (
        models.mlp,
        lambda: Star("d-tr", 1e-4, 0.9, False, True),
        {"damping": 1e-4, "decay": 0.9, "compat": "kradagrad"},
        0.1,
    ),
}


@pytest.mark.parametrize("row", STAR)
def test_kradagrad_star(row: str) -> None:
    make, rule, options, lr = STAR[row]
    case = make()
    maker = from_config(case.model, {"method": "kradagrad_star", **SCHEDULE, **options})
    own = {"grafting": options.get("grafting", "keep"), "block": options.get("block_size")}
    compare(case, maker, Reference(rule, **own), lr, 1e-5)


@pytest.mark.parametrize("T, start, eps, decay", [(1, None, 0.0, None), (3, 1.0, 1e-8, None), (4, 0.1, 1e-3, 0.95)])
@pytest.mark.parametrize("make", [models.mlp, convolution])
def test_kradagrad(make: Any, T: int, start: float | None, eps: float, decay: float | None) -> None:
    case = make()
    maker = from_config(
        case.model, {"method": "kradagrad", "preconditioner_interval": T, "start": start, "damping": eps, "decay": decay}
    )
    compare(case, maker, Reference(lambda: Alternating(eps, T, start, decay)), 0.05, 1e-6)


@pytest.mark.parametrize("T, eps, decay, start", [(1, 0.0, None, 0), (3, 1e-8, None, 3), (4, 1e-2, 0.95, 7)])
@pytest.mark.parametrize("make", [models.mlp, convolution])
def test_kradagrad_as_released(make: Any, T: int, eps: float, decay: float | None, start: int) -> None:
    case = make()
    options = {"preconditioner_interval": T, "damping": eps, "decay": decay, "start_step": start, "compat": "kradagrad"}
    maker = from_config(case.model, {"method": "kradagrad", **options})
    compare(case, maker, Reference(lambda: Release(eps, T, decay, start)), 0.05, 1e-6)


@pytest.mark.parametrize("T", [1, 4, 10])
@pytest.mark.parametrize("make, merge", [(models.mlp, "to_2d"), (convolution, "to_2d"), (convolution, "none")])
def test_kl_shampoo(make: Any, merge: str, T: int) -> None:
    case = make()
    maker = from_config(case.model, {"method": "kl_shampoo", "preconditioner_interval": T, "merge": merge})
    compare(case, maker, Reference(lambda: Kl(0.98, T), merge=merge, beta1=0.9), 0.02, 1e-7)


# --- the update -----------------------------------------------------------------------------------------------------------
def smallest(A: Tensor) -> float:
    return float(torch.linalg.eigvalsh((A + A.T) / 2)[0])


def start(d: int, seed: int) -> Tensor:
    g = gradients(d, d, steps=1, seed=seed)[0]
    return g @ g.T + 0.1 * eye(d)


@pytest.mark.parametrize("den", ["tr", "fro", "op", "d-tr"])
def test_the_update_dominates_the_exact_inverse(den: Any) -> None:
    for seed in range(30):
        L, B = start(4, seed), gradients(4, 3, steps=1, seed=seed + 50)[0]
        new = krad_update(L[None], B[None], den)[0]
        exact = torch.linalg.inv(torch.linalg.inv(L) + B @ B.T)
        assert smallest(new) > 0 or den == "fro"
        assert smallest(L - new) > -1e-10 and torch.equal(new, new.T)
        if den != "fro":  # at least lambda_max only up to a constant
            assert smallest(new - exact) > -1e-10
        if den == "tr":
            assert smallest(new - L / (1 + (L @ B @ B.T).trace())) > -1e-10


@pytest.mark.parametrize("den", ["tr", "op"])
def test_rank_one_is_exact(den: Any) -> None:
    L, b = start(4, 0), gradients(4, 1, steps=1)[0]
    expected = torch.linalg.inv(torch.linalg.inv(L) + b @ b.T)
    assert oracles.relative_error(krad_update(L[None], b[None], den)[0], expected) < 1e-10


@pytest.mark.parametrize("size", [1.0, 1e-9, -1e-9, 1e4])
@pytest.mark.parametrize("columns", [1, 3, 9])
def test_the_array_form_is_woodburys(columns: int, size: float) -> None:
    C, B = gradients(4, 4, steps=1)[0], size * gradients(4, columns, steps=1, seed=1)[0]
    new = C.clone()
    array_update_(new[None], B[None], 0.5)
    assert oracles.relative_error(new @ new.T, torch.linalg.inv(4 * torch.linalg.inv(C @ C.T) + B @ B.T)) < (
        1e-11 if size <= 1 else 1e-8
    )


def test_the_array_form_is_shampoo() -> None:
    steps = gradients(4, 5, steps=40)
    found = run({"method": "kradagrad_star", "grafting": "none", "damping": 1e-4, **SCHEDULE}, [[g] for g in steps])[0]
    state: oracles.State = {}
    expected = steps[0]
    for g in steps:
        expected = g
        for axis in range(2):
            ridge = 1e-4 * float(steps[0].square().sum()) / g.shape[axis]
            H = oracles.averaged(state, f"H{axis}", unfolded(g, axis) @ unfolded(g, axis).T, None) + ridge * eye(g.shape[axis])
            expected = on_axis(power(torch.linalg.inv(H), 0.25), expected, axis)
    assert oracles.relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("exponent", [8, 12])
def test_the_array_form_keeps_its_digits_in_float32(exponent: int) -> None:
    """L^(1/4) after 60 ill-conditioned gradients, in float32 against float64 from the same data."""
    scales = torch.logspace(0, -exponent / 4, 6, dtype=torch.float64)
    steps = [torch.diag(scales) @ g for g in gradients(6, 6, steps=60)]
    results = []
    for dtype in (torch.float32, torch.float64):
        representation = InverseDims(ridge=10.0**-exponent)
        state = representation.init(Frame(1, (6, 6), frozenset(), dtype, CPU))
        for g in steps:
            representation.update(state, Gradient(g.float().to(dtype).unsqueeze(0)), Fold(1.0, 1.0, 1.0, summed=True))
        results.append(PositiveRoot().prepare(representation, state, None)["root_0"][0].double())
    assert oracles.relative_error(*results) < 1e-3


def test_a_vector_is_full_matrix_adagrad() -> None:
    steps = [[g] for g in gradients(5)]
    mean = float(steps[0][0].square().sum()) / 5
    found = run({"method": "kradagrad_star", "denominator": "tr", "grafting": "none", "damping": 1e-3, **SCHEDULE}, steps)[0]
    A = torch.stack([torch.outer(g, g) for (g,) in steps]).sum(0) + 1e-3 * mean * eye(5)
    assert oracles.relative_error(found, power(torch.linalg.inv(A), 0.5) @ steps[-1][0]) < 1e-10


def test_a_positive_root_never_divides() -> None:
    representation = InverseDims(denominator="tr")
    state = representation.init(Frame(1, (3, 2), frozenset(), torch.float64, CPU))
    state["inverse_0"][:] = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    assert PositiveRoot().prepare(representation, state, None)["root_0"].isfinite().all()


def test_whose_turn_it_is() -> None:
    assert [scheduled_axis(t, (2, 5)) for t in range(20)] == [0, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert [scheduled_axis(t, (9, 5, 2)) for t in range(9, 25)] == [0, 1, 2, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]


def test_damping_at_the_start_does_not_annihilate() -> None:
    """L - eps L^2 is zero at L = I / eps: the published batched path."""
    representation = AlternatingInverse(damping=1e-2, start=None)
    state = representation.init(Frame(1, (3, 2), frozenset(), torch.float64, CPU))
    state["inverse_0"].mul_(1e2)
    representation.update(state, Gradient(gradients(3, 2, steps=1)[0].unsqueeze(0)), Fold(1.0, 1.0, 1.0, summed=True))
    assert smallest(state["inverse_0"][0]) > 0


def test_every_touched_root_of_every_block_is_renewed() -> None:
    """The published code renews those of the first block alone."""
    maker: Any = from_config(models.mlp().model, {"method": "kradagrad", "block_size": 2})
    for p in maker.model.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(4):
        maker.precondition()
    for block in maker.plan.blocks:
        for member in block.state["values_0"]:
            assert len(member) == 1 or member.max() > member.min()


# --- KL -------------------------------------------------------------------------------------------------------------------
def test_kl_factors_recover_a_kronecker_covariance() -> None:
    L, R = start(3, 1), start(4, 2)
    representation = CrossDims()
    state = representation.init(Frame(1, (3, 4), frozenset(), torch.float64, CPU))
    samples = (power(L, 0.5) @ g @ power(R, 0.5) for g in gradients(3, 4, steps=3000))
    follow(representation, state, (Gradient(x.unsqueeze(0)) for x in samples), Fold(0.998, 0.002, 0.002))
    found, true = representation.to_dense(state)[0], oracles.kron(L, R)
    cosine = float((found * true).sum() / found.norm() / true.norm())
    assert cosine > 0.99 and 0.9 < float(found.norm() / true.norm()) < 1.1


def test_a_unit_side_gives_the_one_sided_statistic() -> None:
    representation = CrossDims(start=1.0)
    state = representation.init(Frame(1, (3, 4), frozenset(), torch.float64, CPU))
    g = gradients(3, 4, steps=1)[0]
    representation.update(state, Gradient(g.unsqueeze(0)), Fold(0.9, 0.1, 0.1))
    torch.testing.assert_close(state["factor_0"][0], 0.9 * eye(3) + 0.1 * g @ g.T / 4, rtol=1e-12, atol=0)
