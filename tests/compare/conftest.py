"""No drawing and no timing where a test is about something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest


@pytest.fixture
def bare(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, costs without measurement."""
    from gradmaker.compare import cost

    def priced(rows: Mapping[str, Any], *_: object) -> dict[str, cost.Cost]:
        return {key: cost.Cost(0.5, 1.0, 8, 1.0) for key in rows}

    monkeypatch.setattr(cost, "measure", priced)
