"""Growth, profiles and GPT-2: numbers by hand, and whole runs on small sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from tests.docs.test_docs import script

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return script(FOLDER / "growth.py")


@pytest.fixture(scope="module")
def profiles() -> ModuleType:
    return script(FOLDER / "profile_step.py")


@pytest.fixture(scope="module")
def gpt2() -> ModuleType:
    return script(FOLDER / "gpt2.py")


def test_exponents_by_hand(growth: ModuleType) -> None:
    """Of the last three points alone."""
    cubic = {str(n): {"T1": 2e-3 * n**3} for n in (4, 8, 16, 32)} | {"2": {"T1": 99.0}}
    ordered = {size: cubic[size] for size in sorted(cubic, key=int)}
    assert growth.exponent(ordered, "T1") == pytest.approx(3.0)
    assert growth.exponent({"4": {"T1": 1.0}}, "T1") is None and growth.exponent(ordered, "plain") is None


def test_growth_of_a_small_model(growth: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "AXES", {"width": (8, 16), "batch": (4, 8)})
    out = tmp_path / "growth.md"
    growth.main(["SGD", "kfac"], 16, 1.0, out)
    page = out.read_text(encoding="utf-8")
    assert "| kfac, plain, ms |" in page and "![" in page and out.with_suffix(".svg").stat().st_size < 200_000
    found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["axes"]["width"]
    assert found["kfac"]["16"]["memory"] > found["SGD"]["16"]["memory"]


def test_a_row_stops_at_a_long_step(growth: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "point", lambda *_: {"T1": 2000.0, "memory": 1.0})
    assert list(growth.grow(None, ("T1",), "width", (8, 16), 1.0)) == ["8"]
    with pytest.raises(typer.BadParameter, match="'nothing'"):
        growth.main(["nothing"], 8, 1.0, Path())


def test_parts_are_differences(profiles: ModuleType) -> None:
    floors = sys.modules["gradmaker.costs.floor"]
    times = {"sgd": 4.0, "plain": 7.0, "stat": 9.0, "T1": 20.0}
    made = {kind: floors.Floor({"products": 1e9 * t}, {"products": 0.5e-3 * t}) for kind, t in times.items()}
    parts = {name: profiles.part(times, made, *of) for name, of in profiles.parts_of(tuple(times)).items()}
    assert {name: p["ms"] for name, p in parts.items()} == {"passes": 4, "application": 3, "statistics": 2, "refresh": 11}
    assert parts["refresh"] == {"ms": 11.0, "floor": 5.5, "gflop": 11.0}
    assert list(profiles.parts_of(("plain", "T1"))) == ["passes", "application", "statistics and refresh"]
    assert list(profiles.parts_of(("T1",))) == ["passes", "all that is added"]


def test_profile_of_a_small_model(profiles: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workloads = sys.modules["workloads"]
    made = {"small": ("a small MLP", lambda: workloads.mlp(16, 8))}
    monkeypatch.setattr(workloads, "WORKLOADS", made)
    monkeypatch.setattr(profiles, "WORKLOADS", made)
    out = tmp_path / "profile.md"
    profiles.main(["kfac"], "small", 2, 1.0, out)
    page = out.read_text(encoding="utf-8")
    assert "## kfac, a small MLP" in page and "| refresh |" in page and "Operators of a step that does all" in page


def test_gpt2_narrow(gpt2: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every preset can be made and makes steps; the page says what is met, and an error of one is in its line."""
    wrong: dict[str, Any] = {"wrong": ("kfac", {"damping": -1.0})}
    monkeypatch.setattr(gpt2, "PRESETS", gpt2.PRESETS | wrong)
    out = tmp_path / "gpt2.md"
    gpt2.main(None, 2, True, out)
    known = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["presets"]
    assert all(known[name]["ratio"] > 0 and known[name]["memory"] > 0.5 for name in gpt2.PRESETS if name != "wrong")
    assert "damping=-1.0" in known["wrong"]["error"] and "| `'muon', preset='large'`: `iteration=" in out.read_text(
        encoding="utf-8"
    )
