"""Counts of what is computed by rows, and the switch that has all of it formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gradmaker import by_rows
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.planned import PlannedMaker
from gradmaker.step import late


class Taken:
    """How many gradients were preconditioned, and folded in, by rows."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.solved = self.folded = 0
        solve, update, recorded = by_rows.solve, by_rows.update, late.recorded

        def counted_solve(*args: Any) -> Any:
            self.solved += 1
            return solve(*args)

        def counted_update(representation: Any, state: Any, evidence: Any, fold: Any) -> None:
            self.folded += isinstance(evidence, RowGradient)
            update(representation, state, evidence, fold)

        def counted_record(*args: Any) -> Any:
            found = recorded(*args)
            self.folded += sum(isinstance(given, FactoredGradient) for given, _ in (found.pieces if found else ()))
            return found

        patch.setattr(late, "recorded", counted_record)
        patch.setattr(by_rows, "solve", counted_solve)
        patch.setattr(by_rows, "update", counted_update)


@contextmanager
def counted() -> Iterator[Taken]:
    """Context that counts."""
    with pytest.MonkeyPatch.context() as patch:
        yield Taken(patch)


@contextmanager
def all_formed() -> Iterator[None]:
    """Context in which no gradient is held by rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedMaker, "row_layers", lambda self: [])
        yield
