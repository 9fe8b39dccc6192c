"""Rows and their results in types of JSON, and back."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

from gradmaker.compare.cost import Cost
from gradmaker.compare.row_result import RowResult
from gradmaker.compare.rows import Row, plain
from gradmaker.compare.trial import Record


def row_to_plain(result: RowResult) -> dict[str, Any]:
    """A row with its result; trainings by their keys."""
    row, kind = result.row, result.row.kind
    return {
        "row": {
            "label": row.label,
            "maker": plain(row.maker),
            "optimizer": row.optimizer,
            "options": plain(row.options),
            "learning_rates": list(row.learning_rates),
            "kind": None if kind is None else f"{kind.__module__}:{kind.__qualname__}",
            "space": plain(row.space),
        },
        "config": result.config,
        "search": [record.key for record in result.search],
        "finals": [record.key for record in result.finals],
        "learning_rate": result.learning_rate,
        "cost": None if result.cost is None else asdict(result.cost),
        "refusal": result.refusal,
        "chosen": plain(result.chosen),
        "metric": result.metric,
    }


def row_from_plain(stored: Mapping[str, Any], records: Mapping[str, Record]) -> RowResult:
    """The row of `row_to_plain`."""
    given = stored["row"]
    row = Row(**{**given, "learning_rates": tuple(given["learning_rates"]), "kind": _kind(given["kind"])})
    label, cost = row.label, stored["cost"]
    search, finals = ([replace(records[key], label=label) for key in stored[name]] for name in ("search", "finals"))
    same = {record.key: record for record in search}
    return RowResult(
        row=row,
        config=stored["config"],
        search=search,
        finals=[same.get(record.key, record) for record in finals],
        cost=None if cost is None else Cost(**cost),
        **{name: stored[name] for name in ("learning_rate", "refusal", "chosen", "metric")},
    )


def _kind(path: str | None) -> Any:
    """The class of an optimizer; None where its package is not installed, which a report does not need."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None
