"""The page of shared refreshes: what it tells is what was measured, and the bytes are those of the cost model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.test_docs import script

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return script(FOLDER / "scale.py")


@pytest.fixture(scope="module")
def known() -> Any:
    return json.loads((FOLDER / "scale.json").read_text(encoding="utf-8"))


def test_the_page_is_current(scale: ModuleType, known: Any) -> None:
    assert (FOLDER / "scale.md").read_text(encoding="utf-8") == scale.render(known)


def test_bytes_were_those_of_the_cost_model(known: Any) -> None:
    for worlds in known["measured"].values():
        assert [*worlds] == ["1", "2", "4"]
        for found in worlds.values():
            lacking = {k: found["modelled"][k] - size for k, size in found["carried"].items()}
            assert lacking.keys() == found["modelled"].keys()
            assert all(0 <= n < 400 and n % 8 == 0 for n in lacking.values())  # counters, as the page says


def test_what_a_rank_holds_falls(known: Any) -> None:
    """By at least a factor of three from 1 rank to 4, and to at most two moments of Adam on 512."""
    for worlds in known["measured"].values():
        assert 3 * max(worlds["4"]["held"]) < worlds["1"]["held"][0]
    for rows in known["modelled"].values():
        assert all(row["held"] < row["adam"] for row in rows if row["world"] == 512)
