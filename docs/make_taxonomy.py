"""Writes the tables of all parts into docs/taxonomy.md, between marks, from the registries and docstrings."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradmaker import METHODS
from gradmaker.curvature import CURVATURES
from gradmaker.representations import REPRESENTATIONS
from gradmaker.solvers import SOLVERS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from make_methods import parts  # noqa: E402
from make_reference import first_line  # noqa: E402

PAGE = ROOT / "docs" / "taxonomy.md"
AXES: dict[str, Mapping[str, Any]] = {"curvature": CURVATURES, "representation": REPRESENTATIONS, "solver": SOLVERS}


def users() -> dict[str, list[str]]:
    """The methods that have a part on a linear layer, or on its weight, by default."""
    found: dict[str, list[str]] = {}
    for name in METHODS:
        for part in parts(name) if name not in ("gradient", "custom") else ():
            found.setdefault(part, []).append(name)
    return found


def table(axis: str, used: Mapping[str, list[str]]) -> str:
    """Every registered part of an axis with the first line of its docstring, and the methods that have it."""
    lines = [f"| {axis} | what it is | methods that have it by default |", "|---|---|---|"]
    for name, part in AXES[axis].items():
        links = ", ".join(f"[`{method}`](methods/{method}.md)" for method in used.get(name, []))
        lines.append(f"| [`{name}`](reference/{axis}{'' if axis == 'curvature' else 's'}.md) | {first_line(part)} | {links} |")
    return "\n".join(lines)


def render() -> str:
    """The page with the tables of now."""
    text, used = PAGE.read_text(encoding="utf-8"), users()
    for axis in AXES:
        body = f"<!-- {axis}: made by docs/make_taxonomy.py -->\n{table(axis, used)}\n<!-- end of {axis} -->"
        pattern = rf"<!-- {axis}: made by docs/make_taxonomy.py -->.*?<!-- end of {axis} -->"
        text = re.sub(pattern, lambda _, body=body: body, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
