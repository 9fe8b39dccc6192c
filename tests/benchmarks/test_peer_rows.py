"""The comparison with other libraries: windows, floors, checks and the page, on small models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.docs.test_docs import script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return script(FOLDER / "peers.py")


@pytest.fixture
def small(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workload of small layers, in place of all others."""
    workloads = sys.modules["workloads"]
    made = {"small": ("a small MLP", lambda: workloads.mlp(16, 8))}
    monkeypatch.setattr(workloads, "WORKLOADS", made)
    for name in ("peers", "peers_page"):
        monkeypatch.setattr(peers if name == "peers" else sys.modules[name], "WORKLOADS", made)
    monkeypatch.setattr(peers, "EQUAL_ON", "small")
    return "small"


# ------------------------------------------------------------------ times
def test_a_window_is_a_whole_period(monkeypatch: pytest.MonkeyPatch, peers: ModuleType) -> None:
    """On a clock of its own: steps of 1 and, every tenth, of 11 are means of 2, in each window."""
    timing = sys.modules["gradmaker.costs.timing"]
    now = [0.0]
    monkeypatch.setattr(timing, "process_time", lambda: now[0])
    done = [0]

    def period() -> None:
        now[0] += 11.0 if done[0] % 10 == 0 else 1.0
        done[0] += 1

    def one() -> None:
        now[0] += 0.5

    found = timing.measure({"T10": period, "plain": one}, one, 4, 1e9)
    assert found["T10"].ratio == pytest.approx(4.0) and found["T10"].ms == pytest.approx(2000) and found["T10"].spread == 0
    assert found["plain"].ratio == pytest.approx(1.0) and found["plain"].windows == 4


def test_long_steps_are_measured_once(monkeypatch: pytest.MonkeyPatch, peers: ModuleType) -> None:
    timing = sys.modules["gradmaker.costs.timing"]
    now = [0.0]
    monkeypatch.setattr(timing, "process_time", lambda: now[0])

    def slow() -> None:
        now[0] += 2 * timing.LONG

    def quick() -> None:
        now[0] += 0.01

    found = timing.measure({"T1": slow, "plain": quick}, quick, 5, 1e9)
    assert found["T1"].windows == 1 and found["plain"].windows == 5


def test_intervals_of_each_kind_are_those_of_the_maker(peers: ModuleType) -> None:
    """Counted: how often each kind of step measures and refreshes."""
    own, workloads = sys.modules["own_rows"], sys.modules["workloads"]
    row = next(row for row in own.OWN if row.name == "kfac")
    for kind, wanted in (("plain", (1, 1)), ("stat", (20, 1)), ("T1", (20, 20)), ("T10", (2, 2))):
        case = workloads.mlp(16, 8)
        maker = row.make.maker(case, kind)
        for _ in range(20):
            own.declare(maker, case)
            maker.forward_and_backward()
        clocks = maker.step_state.now.clocks.of
        ticks = [max(getattr(clock, which).ticks for clock in clocks.values()) for which in ("measure", "refresh")]
        assert tuple(ticks) == wanted, kind


def test_every_row_of_this_library_steps(peers: ModuleType, small: str) -> None:
    own, workloads = sys.modules["own_rows"], sys.modules["workloads"]
    for row in own.OWN:
        case = workloads.build(small)
        before = sys.modules["row_checks"].flat(case)
        step = row.make(case, row.kinds[-1], 1e-2)
        for _ in range(2):  # SOAP leaves its first step out
            step()
        after = sys.modules["row_checks"].flat(case)
        assert after.isfinite().all() and not torch.equal(before, after), row.name


# ------------------------------------------------------------------ floors
def test_flops_of_a_floor_by_hand(peers: ModuleType) -> None:
    floors = sys.modules["gradmaker.costs.floor"]
    a, b, s = torch.randn(8, 16), torch.randn(16, 4), torch.eye(5)

    def step() -> None:
        a @ b
        a @ b
        torch.linalg.cholesky(s)
        a + a

    found = floors.floor(step)
    assert found.flops == {"products": 2 * 2 * 8 * 16 * 4, "decompositions": 125 // 3}
    assert all(seconds >= 0 for seconds in found.seconds.values()) and found.total == sum(found.seconds.values())


def test_a_floor_changes_nothing(peers: ModuleType) -> None:
    """Products in place are repeated on copies, of the same layout."""
    floors = sys.modules["gradmaker.costs.floor"]
    out, a = torch.zeros(4, 4), torch.randn(4, 6)
    floors.floor(lambda: out.addmm_(a, a.mT))
    assert torch.equal(out, torch.zeros(4, 4).addmm_(a, a.mT))
    assert floors._copy(a.mT).stride() == a.mT.stride() and torch.equal(floors._copy(a.mT), a.mT)


# ------------------------------------------------------------------ checks
def test_learning_falls_and_tells_a_row_that_does_not(peers: ModuleType) -> None:
    own, checks = sys.modules["own_rows"], sys.modules["row_checks"]
    found = checks.learning(own.Row("SGD", "sgd", "torch", own.sgd, ("T1",)), steps=40)
    assert found["last"] < 0.5 * found["first"] and found["accuracy"] > 0.8
    still = own.Row("still", "sgd", "torch", lambda case, kind, rate: lambda: None, ("T1",))
    assert checks.learning(still, steps=5)["last"] > 2


def test_directions_are_told_apart(peers: ModuleType, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, checks = sys.modules["own_rows"], sys.modules["row_checks"]
    assert checks.equal_to_peer("adam", small)[1] < checks.EXACT
    assert checks.equal_to_peer("adagrad", small)[1] < checks.EXACT
    row = next(row for row in own.OWN if row.name == "kfac")
    assert checks.equal_to_formed(row, small) < checks.EXACT
    wrong = checks.trajectory(own.Own("adam", {"damping": 1e-3}, clocks="none", momentum=0.0), "T1", small)
    assert checks.distance(wrong, checks.trajectory(checks._torch("Adam"), "T1", small)) > 1e-3
    factored = checks.FactoredGradient(torch.zeros(1, 1, 9), torch.zeros(1, 1, 9))
    assert factored.pays
    with checks.formed():
        assert not factored.pays
    assert factored.pays


def test_memory_is_a_ratio_to_sgd(peers: ModuleType, small: str) -> None:
    own, checks = sys.modules["own_rows"], sys.modules["row_checks"]
    checks.peak_of_sgd.cache_clear()
    assert checks.peak_ratio(own.Row("SGD", "sgd", "torch", own.sgd, ("T1",)), small) == pytest.approx(1.0, abs=0.02)
    adam = own.Row("Adam", "adam", "torch", own.of_torch(lambda ps, lr: torch.optim.Adam(ps, lr=lr)), ("T1",))
    assert 1.1 < checks.peak_ratio(adam, small) < 2.2


# ------------------------------------------------------------------ runs and the page
def test_a_run_resumes_and_writes_its_page(peers: ModuleType, small: str, tmp_path: Path) -> None:
    sys.modules["row_checks"].peak_of_sgd.cache_clear()
    out = tmp_path / "peers.md"
    run: dict[str, Any] = {
        "rows": ["adam", "smw_ng"],
        "workloads": None,
        "only": "ours",
        "quick": False,
        "again": False,
        "checked": False,
    }
    run |= {"windows": 2, "limit": 1.0, "time_limit": 1.0, "out": out}
    peers.main(**run)
    known = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(known["cells"]) == {"small/adam", "small/smw_ng"}
    known["cells"]["small/adam"]["time"]["T1"]["ratio"] = 77.0
    known["cells"]["small/smw_ng"]["version"] = "other"
    out.with_suffix(".json").write_text(json.dumps(known), encoding="utf-8")
    peers.main(**run)
    again = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["cells"]
    assert again["small/adam"]["time"]["T1"]["ratio"] == 77.0  # known for these sources
    assert again["small/smw_ng"]["version"] == peers.sources()  # measured again
    page = out.read_text(encoding="utf-8")
    peers.main(**{**run, "rows": ["adam"], "again": True})
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["cells"]["small/adam"]["time"]["T1"]["ratio"] < 77
    assert "| adam | - | - | 77.00 |" in page and "Not run: kfac, " in page


def test_a_missing_library_is_an_error_in_its_cell(peers: ModuleType, small: str) -> None:
    own = sys.modules["own_rows"]

    def absent(*_: object) -> Any:
        raise ModuleNotFoundError("No module named 'absent'")

    row = own.Row("absent", "kfac", "absent", absent, ("T1",))
    found = peers.cell(row, small, 2, 1.0)
    assert "No module named" in found["time"]["error"] and peers.version_of(row, "x") == "missing"
    assert not peers.is_known({"version": "missing", **found}, "missing")


def test_targets_by_hand(peers: ModuleType) -> None:
    """The given number, half of the peer's overhead, or the floor."""
    own, page = sys.modules["own_rows"], sys.modules["peers_page"]
    ours = own.Row("kfac", "kfac", "gradmaker", own.sgd, ("T1",))
    theirs = own.Row("peer", "kfac", "other", own.sgd, ("T1",))

    def made(ratio: float, **more: Any) -> dict[str, Any]:
        return {"time": {"T1": {"ratio": ratio, "ms": ratio * 4, "sgd_ms": 4.0}}, "memory": 3.0, **more}

    floor = {"T1": {"ms": 12.0, "gflop": {"products": 1.0}}}
    cells = {"mlp128/kfac": made(4.0, floor=floor), "mlp128/peer": made(9.0), "mlp512/kfac": made(4.0, floor=floor)}
    known = {"cells": cells, "rows": {}}
    rows = (ours, theirs)
    at = page.MEASURES.index("T1")
    assert page.wanted_of(known, rows, ours, "mlp512", at) == (4.7, "")
    assert page.wanted_of(known, rows, ours, "mlp128", at) == (5.0, "")
    cells["mlp128/peer"] = made(2.0)
    assert page.wanted_of(known, rows, ours, "mlp128", at) == (1.25 * 12 / 4, "f")
    assert page.wanted_of(known, rows, ours, "mlp128", page.MEASURES.index("memory")) == (3.0, "")
    assert "4.00 / 3.75f **no**" in page.render(known, rows)


def test_models_of_all_workloads_are_what_they_are_called(peers: ModuleType) -> None:
    workloads = sys.modules["workloads"]
    sizes = {"mlp512": 669_706, "conv": 25_578, "gpt2l": 1_629_761, "resnet18": 11_173_962, "vit": 5_350_090}
    for name, wanted in sizes.items():
        case = workloads.build(name)
        assert sum(p.numel() for p in case.model.parameters()) == wanted, name
    case = workloads.gpt(64, 1, 8, 2)
    assert case.loss(case.model(case.x)).item() == pytest.approx(
        F.cross_entropy(case.model(case.x).transpose(1, 2), case.t).item(), rel=1e-6
    )
    assert isinstance(case.double().model, nn.Module) and case.x.dtype == torch.long


def test_the_page_of_speed_has_the_table_of_the_json_file(peers: ModuleType) -> None:
    page, known = sys.modules["peers_page"], json.loads((FOLDER / "peers.json").read_text(encoding="utf-8"))
    text, rows = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), (*peers.OWN, *peers.PEERS)
    assert page.in_page(text, known, rows) == text
    assert (FOLDER / "peers.md").read_text(encoding="utf-8") == page.render(known, rows)
