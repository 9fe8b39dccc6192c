"""No drawing and no timing where a test is about something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, costs without measurement."""
    from gradmaker.compare import cost, report

    def blank(comparison: Any) -> dict[str, Path]:
        files = {name: comparison.out / f"{name}.png" for name in ("overview", *report.CAPTIONS)}
        for file in files.values():
            file.touch()
        return files

    def priced(rows: Mapping[str, Any], *_: object) -> dict[str, cost.Cost]:
        return {key: cost.Cost(0.5, 1.0, 8, 1.0) for key in rows}

    monkeypatch.setattr(report, "write_plots", blank)
    monkeypatch.setattr(cost, "measure", priced)
