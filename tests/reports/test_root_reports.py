"""Roots inside a maker: Shampoo's choice of them, what `summary`, `cost_report` and `damping_sweep` tell, saved states."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import (
    CasprGradientMaker,
    KfacGradientConfig,
    KfacGradientMaker,
    MuonGradientMaker,
    ShampooGradientConfig,
    ShampooGradientMaker,
    cost_report,
    damping_sweep,
    from_config,
)
from gradmaker.linalg.diagnosis import COLUMNS
from gradmaker.representations import KronDims, RootKronDims
from gradmaker.solvers import DenmanBeavers, Eigh, HigherOrder, NewtonRoot, NewtonSchulz, SvdRoot
from tests.docs.test_docs import ROOT, script

CHOICES: dict[str, tuple[type, type]] = {
    "eigh": (KronDims, Eigh),
    "newton": (KronDims, NewtonRoot),
    "higher_order": (KronDims, HigherOrder),
    "newton_schulz": (KronDims, NewtonSchulz),
    "denman_beavers": (KronDims, DenmanBeavers),
    "svd": (RootKronDims, SvdRoot),
}


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def step(maker: Any, x: Tensor, t: Tensor) -> None:
    maker.model.zero_grad()
    y = maker.setup_model_call(maker.model, x)
    maker.setup_loss_call(F.cross_entropy, y, t)
    maker.forward_and_backward()


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(20, 5, dtype=dtype), torch.randint(3, (20,))) for _ in range(count)]


def gradients(maker: Any) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in maker.model.parameters()])


def shampoo(root: str, **options: Any) -> ShampooGradientMaker:
    return ShampooGradientMaker(model(), ShampooGradientConfig(root=root, damping=1e-4, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("root", CHOICES)
def test_shampoo_is_the_same_by_every_root(root: str, decay: float | None) -> None:
    found = []
    for choice in ("eigh", root):
        maker = shampoo(choice, decay=decay, grafting="none")
        for batch in batches(4):
            step(maker, *batch)
        found.append(gradients(maker))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    triple = maker.plan.blocks[0].triple
    assert (type(triple.representation), type(triple.solver)) == CHOICES[root]
    assert triple.solver.damping == 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize("root", CHOICES)
def test_a_saved_state_goes_on_bitwise(root: str) -> None:
    first, second = shampoo(root, preconditioner_interval=3), shampoo(root, preconditioner_interval=3)
    given = batches(8)
    for batch in given[:5]:
        step(first, *batch)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in given[5:]:
        step(first, *batch)
        step(second, *batch)
        assert torch.equal(gradients(first), gradients(second))
    assert first.summary().refreshes == second.summary().refreshes


def test_a_root_that_a_shape_does_not_allow_is_refused_when_the_maker_is_made() -> None:
    for root in ("newton_schulz", "denman_beavers"):
        with pytest.raises(ValueError, match=r"p = 6 of a factor: expected 2, 4, 8"):
            ShampooGradientMaker(nn.Conv1d(2, 3, 2), ShampooGradientConfig(root=root))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected eigh, newton, higher_order, newton_schulz"):
        ShampooGradientConfig(root="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["shampoo", "caspr"])
def test_square_roots_save_a_float32_statistic(method: str) -> None:
    """One gradient of condition 1e5 has a statistic of 1e10: in float32 only the square root still knows its directions."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] for _ in range(2))
    G = (U * torch.logspace(-5, 0, 12, dtype=torch.float64)) @ V.T
    off = {}
    for root, damping in (("eigh", 1e-6), ("newton", 1e-6), ("svd", 1e-12)):
        layer = nn.Linear(12, 12, bias=False)
        options = {"root": root, "damping": damping, "grafting": "none", "decay": 0.0, "beta1": 0.0, "nesterov_average": False}
        maker = from_config(layer, {"method": method, **options})
        step_by(maker, layer, G.float())
        off[root] = float((layer.weight.grad.double() - U @ V.T).norm() / 12**0.5)  # type: ignore[union-attr]
    assert off["svd"] < 2e-2 and off["eigh"] > 0.3 and off["newton"] > 0.3


def step_by(maker: Any, layer: nn.Linear, G: Tensor) -> None:
    """A step whose gradient is ``G``."""
    y = maker.setup_model_call(layer, torch.eye(12))
    maker.setup_loss_call(lambda out: (out * G.T).sum(), y)
    maker.forward_and_backward()


# ------------------------------------------------------------------ the summary
def test_summary_tells_of_the_last_refresh_with_one_host_read(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = shampoo("newton")
    assert maker.summary().refreshes == [] and "residual" not in str(maker.summary())
    for batch in batches(2):
        step(maker, *batch)
    reads: list[object] = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (reads.append(1), original(self))[1])
    summary = maker.summary()
    assert len(reads) == 1
    names = [row[0] for row in summary.refreshes]
    assert sorted(names) == sorted(
        [f"{k}.weight.{axis}" for k in (0, 2, 4) for axis in (0, 1)] + [f"{k}.bias.0" for k in (0, 2, 4)]
    )
    for _, iterations, residual, largest, damping, retries, failures in summary.refreshes:
        assert 1 < iterations < 40 and 0 < residual < 1e-5 and (retries, failures) == (0, 0)
        assert damping == pytest.approx(1e-4 * largest, rel=1e-6)
    text = str(summary)
    assert all(column in text for column in (*COLUMNS, "failures")) and text.endswith(f"total {summary.bytes:,} bytes")


def test_summary_counts_a_failure_and_keeps_the_row_of_the_root_that_is_kept() -> None:
    maker = shampoo("higher_order", decay=None)
    (batch,) = batches(1)
    step(maker, *batch)
    before = {row[0]: row for row in maker.summary().refreshes}
    block = next(b for b in maker.plan.blocks if b.name == "0.weight")
    block.state["factor_0"].fill_(torch.nan)
    step(maker, *batch)
    after = {row[0]: row for row in maker.summary().refreshes}
    assert after["0.weight.0"] == (*before["0.weight.0"][:-1], 1)
    assert after["2.weight.0"][-1] == 0


def test_methods_without_roots_and_with_cholesky() -> None:
    (batch,) = batches(1)
    for make, count in ((MuonGradientMaker, 0), (KfacGradientMaker, 6), (CasprGradientMaker, 9)):
        maker = make(model())
        step(maker, *batch)
        assert len(maker.summary().refreshes) == count, make


# ------------------------------------------------------------------ the cost report
def test_costs_are_the_textbooks() -> None:
    """Shampoo of one matrix, by hand: ``9 d^3`` to decompose, two products to root and verify, two to apply."""
    layer, rows = nn.Linear(24, 16, bias=False), 10
    maker = ShampooGradientMaker(layer, ShampooGradientConfig(grafting="none", preconditioner_interval=20, warmup_steps=0))
    early = cost_report(maker, torch.randn(rows, 24))
    y = maker.setup_model_call(layer, torch.randn(rows, 24))
    maker.setup_loss_call(F.cross_entropy, y, torch.randint(16, (rows,)))
    maker.forward_and_backward()
    before = {k: v.clone() for k, v in maker.plan.blocks[0].state.items()}
    (row,) = cost_report(maker, torch.randn(rows, 24)).rows
    assert early.rows == [row]
    assert row.step == 3 * 2 * rows * 16 * 24
    assert row.statistic == 2 * 16 * 24 * (16 + 24)
    assert row.apply == 2 * 16 * 24 * (16 + 24)
    cubes = 16**3 + 24**3
    assert (9 + 2) * cubes <= row.refresh <= (9 + 2 + 10) * cubes  # and the checks of the decomposition and of the root
    assert row.bytes == sum(
        v.numel() * v.element_size() for part in ("state", "cache") for v in getattr(maker.plan.blocks[0], part).values()
    )
    assert row.overhead == pytest.approx((row.statistic + row.refresh / 20 + row.apply) / row.step)
    assert all(torch.equal(x, before[k]) for k, x in maker.plan.blocks[0].state.items())


def test_costs_rank_the_roots_and_leave_the_model_alone() -> None:
    refresh = {}
    for root in CHOICES:
        maker = shampoo(root)
        for batch in batches(2):
            step(maker, *batch)
        x = batches(1)[0][0]
        before, random = gradients(maker), torch.get_rng_state()
        report = cost_report(maker, x)
        assert torch.equal(before, gradients(maker)) and torch.equal(random, torch.get_rng_state())
        refresh[root] = sum(row.refresh for row in report.rows)
        assert len(report.rows) == 6 and all(0 < row.overhead < inf for row in report.rows)
        weighted = sum(row.overhead * row.step for row in report.rows) / sum(row.step for row in report.rows)
        assert report.overhead == pytest.approx(weighted, rel=0.2)
        assert str(report).splitlines()[-1].startswith("all: ")
    assert refresh["eigh"] < min(refresh[root] for root in CHOICES if root != "eigh")


def test_costs_of_layers_and_of_batch_norm() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    maker = KfacGradientMaker(net, KfacGradientConfig(curvature_interval=10, preconditioner_interval=10))
    x, t = torch.randn(20, 5), torch.randint(3, (20,))
    step(maker, x, t)
    running = net[1].running_mean.clone()  # type: ignore[union-attr, operator]
    report = cost_report(maker, x)
    assert torch.equal(running, net[1].running_mean)  # type: ignore[arg-type]
    rows = {row.name: row for row in report.rows}
    assert rows["0.weight, 0.bias"].statistic == pytest.approx(2 * 20 * (8**2 + 6**2))
    assert rows["1.weight, 1.bias"].overhead == inf  # nothing that is counted happens there


# ------------------------------------------------------------------ the page and the sweep
def test_the_tables_of_the_page_are_those_that_were_measured() -> None:
    generated = script(ROOT / "docs" / "make_roots.py")
    assert generated.PAGE.read_text(encoding="utf-8") == generated.render(), "run python docs/make_roots.py"
    assert all(f"<!-- {name} -->" in generated.render() for name in generated.tables())


def test_the_sweep_finds_the_damping_for_a_precision() -> None:
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    H = (Q * torch.logspace(-9, 0, 32, dtype=torch.float64)) @ Q.T
    single, double = damping_sweep(H.float(), p=4), damping_sweep(H, p=4, dampings=(1e-2, 1e-6, 1e-12))
    assert {row.solver for row in single.rows} == {"Eigh", "NewtonRoot", "HigherOrder", "NewtonSchulz", "DenmanBeavers"}
    assert {row.solver for row in damping_sweep(H, p=3, dampings=(1e-2,)).rows} == {"Eigh", "NewtonRoot", "HigherOrder"}
    newton = {row.damping: row for row in single.rows if row.solver == "NewtonRoot"}
    assert newton[1e-2].error < 1e-5 < newton[1e-6].error < 2e-2 and newton[1e-6].iterations > newton[1e-2].iterations
    assert newton[1e-12].retries > 0 and newton[1e-2].kappa == pytest.approx(101, rel=1e-3)
    bias = {row.damping: row.bias for row in double.rows if row.solver == "NewtonRoot"}
    assert 1 > bias[1e-2] > bias[1e-6] > bias[1e-12] > 0
    assert all(row.error < 1e-5 and row.residual < 1e-3 for row in double.rows)
    assert double.best().damping == 1e-12 and double.best().error < 1e-6
    assert len(str(single).splitlines()) == len(single.rows) + 2 and re.search(r"NewtonRoot +1e-06", str(single))


@pytest.mark.parametrize("H", [torch.ones(3), torch.ones(2, 3), torch.ones(2, 2, dtype=torch.int64)])
def test_the_sweep_refuses_what_is_no_statistic(H: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a square matrix"):
        damping_sweep(H)


@pytest.mark.parametrize("make", [lambda: torch.zeros(4, 4), lambda: torch.full((4, 4), torch.nan)])
def test_the_sweep_reports_what_has_no_root(make: Callable[[], Tensor]) -> None:
    H = make()
    if H.isnan().any():
        with pytest.raises(ValueError, match="not finite"):
            damping_sweep(H)
        return
    assert all(row.error == inf for row in damping_sweep(H, dampings=(1e-4,)).rows)
