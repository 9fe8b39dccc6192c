"""The result of a comparison of curvatures: its tables, its JSON, its report."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradmaker.fidelity.catalogue import MEASURES
from gradmaker.fidelity.page import write_page
from gradmaker.fidelity.tables import overview, table_of
from gradmaker.fidelity.values import Kept, Spectrum, Value, Values

__all__ = ["Fidelity"]

FORMAT = 1
ALIKE = ("reference", "parameters", "dtype", "damping", "repeats", "how")
"""Of the setting: what values that are averaged share."""


@dataclass(frozen=True)
class Fidelity(Values):
    """The values of all runs; prints as a table, and is written and read as JSON."""

    def table(self, measure: str | None = None) -> str:
        """One measure, layers by approximations; without a name the main measures of the whole model and of the layers."""
        if measure is not None and measure not in MEASURES:
            raise ValueError(f"measure={measure!r}: expected one of {', '.join(MEASURES)}")
        return overview(self) if measure is None else table_of(self, measure)

    def __str__(self) -> str:
        return self.table()

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON, also written to a file."""
        text = json.dumps({"format": FORMAT, **_plain(asdict(self))}, indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Fidelity:
        """The result from its JSON, or from the file that holds it. ValueError for anything else."""
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text("utf-8")
        given = json.loads(text)
        if given.pop("format", None) != FORMAT:
            raise ValueError(f"from_json: expected what to_json() of a Fidelity wrote, format {FORMAT}")
        return cls(
            given["setting"],
            given["layers"],
            [Kept(**_numbers(a)) for a in given["approximations"]],
            [Value(**_numbers(v)) for v in given["values"]],
            [_spectrum(**s) for s in given["spectra"]],
            given["coupling"],
            given["notes"],
        )

    def write(self, folder: str | Path) -> dict[str, Path]:
        """Write JSON, tables, figures and the report into a folder. Returns the files by name. Needs the extra ``compare``."""
        return write_page(self, Path(folder), self.to_json())

    def at_step(self, step: int) -> Fidelity:
        """The same values, as of a step of a training."""
        return replace(
            self,
            values=[replace(v, step=step) for v in self.values],
            spectra=[replace(s, step=step) for s in self.spectra],
        )

    def of_step(self, step: int) -> Fidelity:
        """The values of one step of a training alone."""
        kept = [v for v in self.values if v.step == step]
        return replace(self, values=kept, spectra=[s for s in self.spectra if s.step == step])

    def joined(self, others: Iterable[Fidelity]) -> Fidelity:
        """With the values, spectra and notes of further results of the same layers and approximations."""
        every = [self, *others]
        if any((o.labels, o.layer_names) != (self.labels, self.layer_names) for o in every):
            raise ValueError("joined: the results are of other layers or approximations")
        for name in ALIKE:
            if len(found := list(dict.fromkeys(str(o.setting.get(name)) for o in every))) > 1:
                raise ValueError(f"joined: the results are of different {name}: {' and '.join(found[:2])}")
        if any(list(a.values) == list(b.values) for a, b in itertools.combinations(every, 2)):
            raise ValueError("joined: one result is given twice, which would halve the squares of its standard errors")
        return replace(
            every[-1],
            values=list(_numbered(every)),
            spectra=[s for o in every for s in o.spectra],
            notes=list(dict.fromkeys(note for o in every for note in o.notes)),
        )


def _numbered(results: Iterable[Fidelity]) -> Iterable[Value]:
    """Their values; the batches of results at a step that an earlier one has, too, are others and have further numbers."""
    after: dict[int, int] = {}
    for own in results:
        first = max((after.get(step, 0) for step in own.steps), default=0)
        for v in own.values:
            yield replace(v, batch=first + v.batch)
        after |= {step: first + 1 + max(v.batch for v in own.values) for step in own.steps}


def _plain(given: Any) -> Any:
    """The same without numbers that JSON does not have: NaN and infinity as None and text."""
    if isinstance(given, Mapping):
        return {k: _plain(v) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return [_plain(v) for v in given]
    if isinstance(given, float) and not math.isfinite(given):
        return None if math.isnan(given) else ("inf" if given > 0 else "-inf")
    return given


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `_plain`, for a mapping of numbers and names."""
    back = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
    named = ("label", "approximation", "layer")
    return {k: back.get(v, v) if k not in named and (v is None or isinstance(v, str)) else v for k, v in given.items()}


def _spectrum(nodes: list[float], weights: list[float], **named: Any) -> Spectrum:
    return Spectrum(nodes=tuple(nodes), weights=tuple(weights), **named)
