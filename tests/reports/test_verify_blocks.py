"""`maker.verify()` of large blocks and of all methods: nothing is left out, right makers pass, planted defects do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Outer, Pair
from gradmaker.reports.verification import Verification, blocks
from gradmaker.reports.verification.passes import _row
from gradmaker.reports.verification.scratch import ONCE
from gradmaker.representations import Diagonal, Kron, KronDims, Pairs
from gradmaker.representations.base import Frame
from gradmaker.representations.low_rank import Spanned
from gradmaker.solvers import CG, Apply, Cholesky, CurveBall, Division, Eigh, Gram, NewtonRoot, Rotate, TruncatedCG
from gradmaker.solvers.base import InverseSolver
from tests import models, oracles
from tests.zoo.registry import ZOO as LARGE_ZOO

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torch has no batching rule for attention
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input"),  # torch has no fused RMSNorm of mixed precision
]
PRECONDITIONED = [m for m in METHODS if m not in ("gradient", "custom")]
OF_THE_README = ["kfac", "ekfac", "shampoo", "soap", "adam", "muon"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
ROTATED = ["kfac", "ekfac", "unit_ng", "shampoo", "soap", "adam", "smw_ng", "psgd", "lbfgs", "hessian_free"]


def verified(case: models.Case, autocast: bool = False, **options: Any) -> Verification:
    maker: Any = from_config(case.model, options)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        found: Verification = maker.verify()
    return found


def cast(case: models.Case, dtype: torch.dtype) -> models.Case:
    x, t = (v.to(dtype) if v.is_floating_point() else v for v in (case.x, case.t))
    return models.Case(case.model.to(dtype), x, t, case.loss)


def square() -> models.Case:
    """Layers of which some have weights, and others weights with their biases, of equal sides."""
    make = lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 6))  # noqa: E731
    return models.build(make, 6, 4)


# ------------------------------------------------------------------ nothing is left out, and nothing is blamed
def readme() -> models.Case:
    """The network of the README, in float32."""
    layers = (nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return cast(models.build(lambda: nn.Sequential(*layers), 32, 1, 28, 28), torch.float32)


@pytest.mark.parametrize("method", OF_THE_README)
def test_every_cell_of_the_readme_network_is_computed(method: str) -> None:
    found = verified(readme(), method=method)
    assert found.passed and found.complete, str(found)
    for check in found.checks:
        assert check.solve is not None and check.approximation is not None and check.verdict == "ok"
        assert (check.gradients is not None) == (method in ("kfac", "ekfac"))
    assert {c.how for c in found.checks if "weight" in c.site or method in ("kfac", "ekfac")} == {"probes"}


@pytest.mark.parametrize("index", range(len(models.ZOO)))
def test_no_false_alarm_on_the_zoo(index: int) -> None:
    """Every model with kfac, and with two more methods, in all precisions; -m slow runs all of them."""
    name = list(models.ZOO)[index]
    precisions = list(DTYPES)
    for j, method in enumerate(("kfac", ROTATED[index % len(ROTATED)], ROTATED[(3 * index + 5) % len(ROTATED)])):
        expect_right(name, method, precisions[(index + j) % 3])


@pytest.mark.slow
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", models.ZOO)
def test_no_false_alarm_anywhere(name: str, precision: str) -> None:
    for method in ROTATED:
        expect_right(name, method, precision)


def expect_right(name: str, method: str, precision: str) -> None:
    case = cast(models.ZOO[name](), DTYPES[precision])
    found = verified(case, precision == "bfloat16", method=method)
    assert found.passed, f"{name}, {method}, {precision}\n{found}"
    idle = [c.site for c in found.checks if not c.complete]
    assert not idle or name == "unused", f"{name}, {method}, {precision}\n{found}"


@pytest.mark.parametrize("method", PRECONDITIONED)
def test_products_and_matrices_agree_for_every_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = verified(square(), method=method)
    monkeypatch.setattr(blocks, "DENSE_LIMIT", 0)
    probed = verified(square(), method=method)
    for found in (dense, probed):
        assert found.passed and found.complete, str(found)
        assert all(c.solve is not None for c in found.checks)
    assert all("dense" not in c.how for c in probed.checks)
    assert [c.site for c in dense.checks] == [c.site for c in probed.checks]
    for a, b in zip(dense.checks, probed.checks, strict=True):
        assert (a.approximation is None) == (b.approximation is None)
        if a.approximation is not None and b.approximation is not None and a.approximation > 1e-10:
            assert 0.1 < b.approximation / a.approximation < 10
        elif a.approximation is not None:
            assert b.approximation is not None and b.approximation < 1e-10


COUPLED = [
    "BasicBlock, batch norm in training",
    "contrastive, negatives of the batch",
    "mixture of experts, top 1",
    "GRU, bidirectional",
    "LSTM, time first",
]


@pytest.mark.parametrize("after", [False, True], ids=["before the first step", "after a step"])
@pytest.mark.parametrize("method", ["kfac", "unit_ng"])
@pytest.mark.parametrize("name", [n for n in COUPLED if n in LARGE_ZOO])
def test_layers_that_are_measured_in_another_way_are_no_alarm(name: str, method: str, after: bool) -> None:
    """Examples that depend on each other, parameters without a layer, time first: measured apart, directly, or as one."""
    entry = LARGE_ZOO[name]
    case = entry.make()
    maker: Any = from_config(case.model, {"method": method, **entry.options})
    case.declare(maker)
    if after:
        maker.forward_and_backward()
        case.declare(maker)
    found = maker.verify()
    assert found.passed, str(found)
    reached = [c for c in found.checks if c.complete]
    assert reached and all(c.gradients is not None and c.gradients < 1e-12 for c in reached), str(found)


# ------------------------------------------------------------------ the definitions, against matrices
@pytest.mark.parametrize("memory", [1, 3])
def test_products_with_secant_pairs_are_those_of_the_matrix(memory: int) -> None:
    pairs = Pairs(memory=memory)
    torch.manual_seed(0)
    state = pairs.init(Frame(1, (7,), frozenset(), torch.float64, torch.device("cpu")))
    for sign in (1.0, 1.0, -1.0, 1.0, 1.0):
        v = torch.randn(1, 7, dtype=torch.float64)
        pairs.update(state, Pair(v, sign * v * (0.5 + torch.rand(1, 7, dtype=torch.float64)), "secant"), ONCE)
        x = torch.randn(1, 7, dtype=torch.float64)
        expected = (pairs.to_dense(state) @ x.unsqueeze(-1)).squeeze(-1)
        assert oracles.relative_error(pairs.matvec(state, x), expected) < 1e-12
        assert oracles.relative_error(pairs.apply(state, pairs.matvec(state, x)), x) < 1e-11


# ------------------------------------------------------------------ planted defects
Plant = Callable[[pytest.MonkeyPatch], None]


def damped_more(monkeypatch: pytest.MonkeyPatch, solver: type[InverseSolver]) -> None:
    """The damping that is used is one per cent larger than the one that is asked for."""
    prepare = solver.prepare
    monkeypatch.setattr(solver, "prepare", lambda self, *args: prepare(replace(self, damping=1.01 * self.damping), *args))


def scaled(monkeypatch: pytest.MonkeyPatch, part: type, name: str, factor: float = 1 + 1e-6) -> None:
    original = getattr(part, name)
    monkeypatch.setattr(part, name, lambda self, *args: original(self, *args) * factor)


def swapped(monkeypatch: pytest.MonkeyPatch, solver: type) -> None:
    """Square gradients are solved with the factors of each other's side."""
    original = solver.solve  # type: ignore[attr-defined]

    def solve(self: Any, representation: Any, cache: dict[str, Tensor], g: Tensor) -> Tensor:
        mixed = dict(cache)
        for kind in ("root", "basis"):
            if f"{kind}_1" in cache and cache[f"{kind}_0"].shape == cache[f"{kind}_1"].shape:
                mixed[f"{kind}_0"], mixed[f"{kind}_1"] = cache[f"{kind}_1"], cache[f"{kind}_0"]
        found: Tensor = original(self, representation, mixed, g)
        return found

    monkeypatch.setattr(solver, "solve", solve)


def loses_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first entry of every result is left out."""
    original = NewtonRoot.solve

    def solve(self: Any, *args: Any) -> Tensor:
        out = original(self, *args).clone()
        out[(slice(None), *[0] * (out.ndim - 1))] = 0
        return out

    monkeypatch.setattr(NewtonRoot, "solve", solve)


SOLVES: dict[str, tuple[dict[str, Any], Plant]] = {
    "K-FAC, damping": ({"method": "kfac"}, partial(damped_more, solver=Cholesky)),
    "K-FAC, factors": ({"method": "kfac"}, partial(swapped, solver=Cholesky)),
    "K-FAC with exact damping, damping": ({"method": "kfac", "split": "exact"}, partial(damped_more, solver=Eigh)),
    "EKFAC, damping": ({"method": "ekfac"}, partial(damped_more, solver=Rotate)),
    "EKFAC, factors": ({"method": "ekfac"}, partial(swapped, solver=Rotate)),
    "Shampoo, a direction": ({"method": "shampoo", "root": "newton"}, loses_a_direction),
    "Shampoo, factors": ({"method": "shampoo", "root": "newton"}, partial(swapped, solver=NewtonRoot)),
    "Adam, damping": ({"method": "adam", "damping": 0.1}, partial(damped_more, solver=Division)),
    "SMW, damping": ({"method": "smw_ng"}, partial(damped_more, solver=Gram)),
    "PSGD, scale": ({"method": "psgd_kf"}, partial(scaled, part=Apply, name="solve")),
    "L-BFGS, scale": ({"method": "lbfgs"}, partial(scaled, part=Apply, name="solve")),
    "CG, scale": (
        {"method": "custom", "curvature": "FisherExact", "representation": "Kron", "solver": {"CG": {"iterations": 500}}},
        partial(scaled, part=CG, name="solve"),
    ),
    "Hessian-free, scale": ({"method": "hessian_free"}, partial(scaled, part=TruncatedCG, name="solve")),
    "CurveBall, scale": ({"method": "curveball"}, partial(scaled, part=CurveBall, name="solve")),
}


@pytest.mark.parametrize("limit", [0, 2048], ids=["probes", "dense"])
@pytest.mark.parametrize("name", SOLVES)
def test_a_solve_that_is_off_is_found(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options, plant = SOLVES[name]
    monkeypatch.setattr(blocks, "DENSE_LIMIT", limit)
    assert verified(square(), **options).passed
    plant(monkeypatch)
    found = verified(square(), **options)
    assert not found.passed and "ABOVE TOLERANCE" in str(found), str(found)


HELD: dict[str, tuple[str, Plant, float]] = {
    "axes": ("shampoo", partial(scaled, part=KronDims, name="matvec", factor=3.0), 0.5),
    "low rank": ("smw_ng", partial(scaled, part=Spanned, name="matvec", factor=1.01), 0.009),
    "diagonal": ("diag_ng", partial(scaled, part=Diagonal, name="matvec", factor=3.0), 0.5),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_represented_is_compared_by_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, plant, change = HELD[name]
    monkeypatch.setattr(blocks, "DENSE_LIMIT", 0)
    before = [c.approximation or 0.0 for c in verified(square(), method=method).checks]
    plant(monkeypatch)
    after = [c.approximation or 0.0 for c in verified(square(), method=method).checks]
    assert all(abs(a - b) > change * max(b, 1.0) * 0.5 for a, b in zip(after, before, strict=True)), (before, after)


def test_factors_of_each_others_side_are_a_worse_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(self: Any, state: dict[str, Tensor]) -> list[Tensor]:
        left, right = original(self, state)
        return [right, left] if left.shape == right.shape else [left, right]

    original = Kron.factors
    before = [c.approximation or 0.0 for c in verified(square(), method="kfac").checks]
    monkeypatch.setattr(Kron, "factors", factors)
    after = [c.approximation or 0.0 for c in verified(square(), method="kfac").checks]
    assert all(a > 1.5 * b for a, b in zip(after[::2], before[::2], strict=True)), (before, after)


def test_what_cannot_be_computed_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "DENSE_LIMIT", 0)
    monkeypatch.setattr(blocks, "Defined", Verification)  # which no solver is
    found = verified(square(), method="kfac")
    assert found.passed and not found.complete
    assert [c.verdict for c in found.checks] == ["unchecked"] * 3 and not any(c.solve for c in found.checks)
    assert " ok" not in str(found) and "Cholesky has no equation for blocks of 25 parameters" in str(found)


def test_evidence_of_one_example_is_cut_from_all() -> None:
    """The rows that are compared are those of the whole, whatever the inputs are."""
    torch.manual_seed(0)
    g = torch.randn(2, 1, 5, 3, 4)
    for inputs in (torch.randn(1, 5, 3, 6), OneHot(torch.randint(6, (5, 3)), 6, None)):
        outer = Outer(inputs, g, bias=isinstance(inputs, Tensor))
        rows = outer.rows()
        for j in range(10):
            assert torch.equal(_row(outer, j).rows()[0], rows[j])


def test_a_loss_of_one_example() -> None:
    case = models.build(lambda: nn.Linear(4, models.CLASSES), 1, 4)
    found = verified(case, method="kfac")
    assert found.passed and found.complete
    assert F.cross_entropy is case.loss
