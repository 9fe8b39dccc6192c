"""Writes docs/reference.md, a line for each public name, and the pages in docs/reference/ that MkDocs fills."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "reference.md", ROOT / "docs" / "reference"
HEAD = """# Reference

Every public name with the first line of its docstring; the pages have the rest. `import gradmaker` has the names of the first
four groups; parts are imported from `gradmaker.curvature`, `gradmaker.representations` and `gradmaker.solvers`. Made by
`docs/make_reference.py`; not to be edited.
"""
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "optimizer": ("Optimizer", ("gradmaker.front_door",)),
    "makers": (
        "Makers, configs and triples",
        (
            "gradmaker.maker",
            "gradmaker.preconditioner",
            "gradmaker.config",
            "gradmaker.triple",
            "gradmaker.options",
            "gradmaker.schedule",
            "gradmaker.errors",
            "gradmaker.scale",
        ),
    ),
    "methods": ("Methods", ("gradmaker.methods",)),
    "compare": ("Comparisons, costs, sweeps", ("gradmaker.compare", "gradmaker.costs", "gradmaker.damping_sweep")),
    "reports": ("Curvature, fidelity and coverage of a model", ("gradmaker.reports", "gradmaker.fidelity")),
    "curvature": ("Curvature", ("gradmaker.curvature",)),
    "representations": ("Representations", ("gradmaker.representations",)),
    "solvers": ("Solvers", ("gradmaker.solvers",)),
}
"""File name -> title, and the modules whose public names it has."""
MODULES = (
    "gradmaker",
    "gradmaker.compare",
    "gradmaker.fidelity",
    "gradmaker.schedule",
    "gradmaker.reports.spectrum",
    "gradmaker.reports.coverage",
    "gradmaker.curvature",
    "gradmaker.representations",
    "gradmaker.solvers",
)
"""Whose `__all__` is public."""


def public() -> dict[str, tuple[str, Any]]:
    """Classes and functions with their group, by the dotted name of their definition, in the order of `MODULES`."""
    found: dict[str, tuple[str, Any]] = {}
    for module_name in MODULES:
        module = import_module(module_name)
        for each in module.__all__:
            item = getattr(module, each)
            if (inspect.isclass(item) or inspect.isfunction(item)) and item.__module__.startswith("gradmaker"):
                name = f"{item.__module__}.{item.__qualname__}"
                found.setdefault(name, (group_of(name if module_name == "gradmaker" else f"{module_name}.{each}"), item))
    return found


def group_of(name: str) -> str:
    """The page of a name. ValueError where none has its module."""
    for group, (_, modules) in GROUPS.items():
        if any(name.startswith(module + ".") for module in modules):
            return group
    raise ValueError(f"docs/make_reference.py: no group has {name}")


def first_line(item: Any) -> str:
    """Of the docstring, for a cell of a table: code with bars as HTML, which no reader of Markdown cuts there."""
    text = (inspect.getdoc(item) or "").partition("\n")[0]
    return re.sub(r"``([^`]*\|[^`]*)``", lambda found: f"<code>{escape(found[1])}</code>", text).replace("|", "&#124;")


def page(group: str, names: Iterable[str]) -> str:
    """The directives of a group; options of methods are on their own pages, with defaults."""
    return "\n\n".join([f"# {GROUPS[group][0]}", *(f"::: {name}" for name in names)]) + "\n"


def pages() -> dict[Path, str]:
    """Every page with its text."""
    items = public()
    by_group = {group: [name for name, (home, _) in items.items() if home == group] for group in GROUPS}
    lines = [HEAD]
    for group, names in by_group.items():
        rows = [f"| [`{name.rsplit('.', 1)[1]}`](reference/{group}.md) | {first_line(items[name][1])} |" for name in names]
        lines.append("\n".join([f"## {GROUPS[group][0]}\n", "| name | |", "|---|---|", *rows]) + "\n")
    return {PAGE: "\n".join(lines)} | {FOLDER / f"{group}.md": page(group, names) for group, names in by_group.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
