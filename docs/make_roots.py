"""Writes the tables of docs/roots.md from benchmarks/roots.json: what lies between two marks is replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().with_name("roots.md")
SAVED = PAGE.parents[1] / "benchmarks" / "roots.json"
METHODS = ["Eigh", "NewtonRoot", "HigherOrder", "NewtonSchulz", "DenmanBeavers"]


def render() -> str:
    """The page with the tables of now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in tables().items():
        body = "\n".join([f"<!-- {name} -->", *lines, f"<!-- end {name} -->"])
        text = re.sub(rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def tables() -> dict[str, list[str]]:
    """Lines of every table by its name."""
    saved = json.loads(SAVED.read_text(encoding="utf-8"))
    entries = saved["entries"]
    single = [e for e in entries if e["table"] == "2.1" and e["dtype"] == "float32"]
    fourth = [e for e in single if e["p"] == 4] + [e for e in entries if (e["table"], e["method"]) == ("S9", "SvdRoot")]
    times = [[n, *(f"{1e3 * row[m]:.1f}" for m in [*METHODS, "SvdRoot"])] for n, row in saved["seconds"].items()]
    return {
        "fourth": _pivot(fourth, "condition", [1e4, 1e6, 1e7, 1e8, 1e10, 1e12], [*METHODS, "SvdRoot"]),
        "square": _pivot([e for e in single if e["p"] == 2], "condition", [1e2, 1e4, 1e6, 1e7], METHODS),
        "time": _table(["n", *METHODS, "SvdRoot"], times),
        "damped": _pivot([e for e in entries if e["table"] == "damped"], "damping", [10.0**-k for k in range(3, 8)], METHODS),
        "bfloat16": _pivot(
            [e for e in entries if e["table"] == "bfloat16"], "damping", [10.0**-k for k in range(1, 5)], METHODS[:2]
        ),
    }


def _pivot(entries: Sequence[dict[str, Any]], key: str, values: Sequence[float], methods: Sequence[str]) -> list[str]:
    found = {(e[key], e["method"]): _cell(e) for e in entries}
    return _table([key, *methods], [[f"{v:.0e}", *(found.get((v, m), "") for m in methods)] for v in values])


def _cell(entry: dict[str, Any]) -> str:
    iterations = f" ({entry['iterations']:.0f})" if entry["iterations"] else ""
    return ("negative" if entry["error"] == "inf" else f"{entry['error']:.1e}") + iterations


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    heads = [f"`{name}`" if name[0].isupper() else name for name in head]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
