"""The table of errors that `verify` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["COLUMNS", "Check", "Verification"]

COLUMNS = ("gradients", "solve", "approximation")
TOLERANCES = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-3, 1e-1), torch.bfloat16: (1e-3, 1e-1)}
"""For captured gradients and for solves. An inverse root in float32 with the customary ridge of 1e-6 lambda_max is accurate to
a few percent only: the unit roundoff times a condition number of 1e6."""
HALF = 0.06
"""For captured gradients where layers ran in half precision: autograd rounds sums, and correct models differ by 1.5e-2."""

ROUNDINGS = 100
"""The same in units of the unit roundoff of a layer that computes in float32 in a float64 model."""


@dataclass(frozen=True)
class Check:
    """Relative errors of one site; None where a check does not apply, or where `unchecked` says why it could not be made.

    Batch norm in training mode couples the examples of a batch: a layer before it has no per-example gradients. The check
    then holds the batch's mean and variance fixed, as the batch norm's own block does, and `Verification` says so.

    gradients: per-example gradients as captured, against a backward pass for one example alone.
    solve: ``P g`` as solved, against the method's formula in float64.
    approximation: the represented curvature against the measured one; the price of the representation, not an error.
    """

    site: str
    dtype: torch.dtype
    gradients: float | None
    solve: float | None
    approximation: float | None
    how: str = ""  # dense: by matrices; probes: by products with a few random vectors
    unchecked: Mapping[str, str] = field(default_factory=dict)  # by column: why
    failure: str | None = None  # the finding of a self-check
    accuracy: float = 0.0  # relative error that the solver's stopping rule allows
    half: bool = False  # whether a layer of the pass ran in half precision
    rounding: float = 0.0  # unit roundoff of a layer that computes in less than the dtype of the pass

    @property
    def passed(self) -> bool:
        """Whether no self-check failed and every computed error is within the tolerance of its dtype."""
        captured, solved = TOLERANCES[self.dtype]
        captured = max(captured, ROUNDINGS * self.rounding)
        pairs = ((self.gradients, HALF if self.half else captured), (self.solve, max(solved, self.accuracy)))
        return self.failure is None and all(error is None or error <= most for error, most in pairs)

    @property
    def complete(self) -> bool:
        """Whether everything that applies was computed."""
        return not self.unchecked

    @property
    def verdict(self) -> str:
        """``ok``, or what the row has failed or lacks."""
        if self.failure is not None:
            return "SELF-CHECK FAILED"
        if not self.passed:
            return "ABOVE TOLERANCE"
        return "ok" if self.complete else "unchecked"

    def cells(self) -> list[str]:
        """The cells of its row in the table."""
        values = (self.gradients, self.solve, self.approximation)
        cells = [_cell(x, name in self.unchecked) for name, x in zip(COLUMNS, values, strict=True)]
        return [self.site, *cells, self.how or "-", self.verdict]


@dataclass(frozen=True)
class Verification:
    """One check for each site, and notes; prints as a table."""

    checks: list[Check]
    frozen: list[str] = field(default_factory=list)  # batch norms whose statistics were held fixed
    notes: Mapping[str, str] = field(default_factory=dict)  # of the self-checks, by parameter, layer or "loss"

    @property
    def passed(self) -> bool:
        """Whether every computed error is within tolerance, and every self-check has passed."""
        return all(check.passed for check in self.checks)

    @property
    def complete(self) -> bool:
        """Whether everything that applies was computed; if not, the table says what is missing, and why."""
        return all(check.complete for check in self.checks)

    def __str__(self) -> str:
        rows = [["site", *COLUMNS, "by", ""], *(c.cells() for c in self.checks)]
        widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        lines = [self._line(row, widths) for row in rows]
        reasons: dict[str, list[str]] = {}
        for check in self.checks:
            for column, reason in check.unchecked.items():
                reasons.setdefault(f"{column} unchecked, {reason}", []).append(check.site)
            if check.failure is not None:
                reasons.setdefault(f"self-check failed, {check.failure}", []).append(check.site)
        lines += [f"{reason}: {', '.join(sites)}" for reason, sites in reasons.items()]
        told = {check.failure for check in self.checks}
        for note in dict.fromkeys(note for note in self.notes.values() if note not in told):
            lines.append(f"{', '.join(name for name, own in self.notes.items() if own == note)}: {note}")
        if self.frozen:
            names = ", ".join(self.frozen)
            lines.append(f"checked with the statistics of this batch held fixed, so that its examples are independent: {names}")
        return "\n".join(lines)

    @staticmethod
    def _line(row: list[str], widths: list[int]) -> str:
        site, *cells, how, verdict = (
            text.ljust(w) if j in (0, 4, 5) else text.rjust(w) for j, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([site, *cells, how, verdict]).rstrip()


def _cell(error: float | None, unchecked: bool) -> str:
    if error is None:
        return "unchecked" if unchecked else "-"
    return format(error, ".1e")
