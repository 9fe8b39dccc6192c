"""The structure of the library in numbers: sizes, complexity, base classes, types, imports that run up, private names.

    python benchmarks/structure.py [--json] [--tree CHECKOUT] [--floors FLOORS.json]

All of it is read off the sources; nothing of the library is imported. The floors are those of `tests/structure/floors.py`, or
a list from the ground, `[{"rooms": ["options", "linalg"], "in_order": true}, {"rooms": ["curvature"]}, ...]`.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.structure import imports, private, shims  # noqa: E402
from tests.structure.floors import FLOORS, Floor  # noqa: E402
from tests.structure.sources import Source, read  # noqa: E402

BASES = {"Curvature": "gradmaker.curvature", "Representation": "gradmaker.representations", "Solver": "gradmaker.solvers"}
"""Base classes of the axes, and the folders that they stand in."""

Sources = Mapping[str, Source]
Numbers = dict[str, dict[str, Any]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- sizes ----------------------------------------------------------------------------------------------------------------
def percentile(values: Sequence[int], share: float) -> int:
    """By nearest rank: the least value that so large a share is not above."""
    return sorted(values)[max(1, ceil(share * len(values))) - 1]


def sizes(sources: Sources) -> dict[str, Any]:
    lines = {source.path: len(source.text.splitlines()) for source in sources.values()}
    longest = max(lines, key=lambda path: lines[path])
    return {"files": len(lines), "lines": sum(lines.values()), "longest file": f"{lines[longest]} ({longest})"}


def functions(sources: Sources) -> Iterator[tuple[Source, Function]]:
    """All of them: methods, and what is defined inside of others."""
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, Function):
                yield source, node


def length(function: Function) -> int:
    """Lines from ``def`` on, docstring and all."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def complexity(function: Function) -> int:
    """McCabe's cyclomatic number as ruff's C901 counts it: neither boolean operators nor comprehensions."""
    return 1 + sum(_branches(node) for node in ast.walk(function) if node is not function)


def _branches(node: ast.AST) -> int:
    if isinstance(
        node, ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.FunctionDef | ast.AsyncFunctionDef
    ):
        return 1
    if isinstance(node, ast.Match):
        return len(node.cases) - int(_takes_all(node.cases[-1]))
    return int(isinstance(node, ast.Try) and bool(node.orelse))


def _takes_all(case: ast.match_case) -> bool:
    """Whether a case is a match statement's ``else``."""
    return case.guard is None and isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None


def spread(found: Sequence[tuple[Source, Function]], measure: Callable[[Function], int], *, middle: bool) -> dict[str, Any]:
    values = [measure(function) for _, function in found]
    source, worst = max(found, key=lambda pair: measure(pair[1]))
    said: dict[str, Any] = {"median": median(values)} if middle else {}
    said |= {f"p{round(100 * share)}": percentile(values, share) for share in (0.9, 0.99)}
    return said | {"max": f"{measure(worst)} ({source.path}: {worst.name})"}


# --- base classes ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Class:
    """What a class statement says."""

    module: str
    name: str
    bases: tuple[str, ...]  # without module and arguments
    members: dict[str, str]  # public ones, by kind


def classes(sources: Sources) -> list[Class]:
    found = ((source, node) for source in sources.values() for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef))
    return [Class(s.module, c.name, tuple(map(_last_name, c.bases)), members(c)) for s, c in found]


def members(statement: ast.ClassDef) -> dict[str, str]:
    """Annotations, properties and methods, without those that begin with an underscore."""
    found: dict[str, str] = {}
    for node in statement.body:
        if isinstance(node, Function):
            decorators = {_last_name(d) for d in node.decorator_list}
            found[node.name] = "property" if decorators & {"property", "cached_property"} else "method"
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: "annotation" for target in targets if isinstance(target, ast.Name)}
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript | ast.Call):
        return _last_name(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def base_class(name: str, found: Sequence[Class]) -> dict[str, Any]:
    """How many members there are, those of its own bases among them, and how many classes say something else."""
    base = next(c for c in found if c.name == name and c.module.startswith(BASES[name]))
    lineage = [c for c in found if c.name in _closure(base.bases, {c.name: c.bases for c in found})]
    own = {member: kind for c in (*lineage, base) for member, kind in c.members.items()}
    below: dict[str, tuple[str, ...]] = {}
    for c in found:
        for above in c.bases:
            below[above] = (*below.get(above, ()), c.name)
    heirs = [c for c in found if c.name in _closure(below.get(name, ()), below)]
    overriding = {member: sum(member in heir.members for heir in heirs) for member in own}
    kinds = {
        f"{kind}s".replace("ys", "ies"): sum(k == kind for k in own.values()) for kind in ("annotation", "property", "method")
    }
    once = sorted(member for member, times in overriding.items() if times == 1)
    never = sorted(member for member, times in overriding.items() if times == 0)
    told = {"members": len(own), **kinds, "subclasses": len(heirs)}
    return told | {"overridden by one subclass": _counted(once), "overridden by none": _counted(never)}


def _closure(names: Sequence[str], further: Mapping[str, tuple[str, ...]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += further.get(name, ())
    return reached


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "0"


# --- types ----------------------------------------------------------------------------------------------------------------
def annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of all annotations, quoted ones parsed."""
    for node in ast.walk(tree):
        for written in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(written, ast.expr):
                yield from _parsed(written)


def _parsed(written: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(written):
        yield node
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                yield from ast.walk(ast.parse(node.value, mode="eval"))
            except SyntaxError:  # an element of a Literal
                continue


def _is_any(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")


def _is_cast(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    of_typing = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "typing"
    return (of_typing and function.attr == "cast") or (isinstance(function, ast.Name) and function.id == "cast")


def ignores(text: str) -> int:
    comments = (
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    )
    return sum(bool(re.search(r"#\s*type:\s*ignore", comment)) for comment in comments)


def types(sources: Sources) -> dict[str, Any]:
    annotated = [node for source in sources.values() for node in annotations(source.tree) if _is_any(node)]
    everywhere = [node for source in sources.values() for node in ast.walk(source.tree)]
    known = set(map(id, annotated))
    return {
        "`Any` in annotations": len(annotated),
        "`Any` elsewhere": sum(_is_any(node) and id(node) not in known for node in everywhere),
        "`cast(`": sum(map(_is_cast, everywhere)),
        "`# type: ignore`": sum(ignores(source.text) for source in sources.values()),
    }


# --- borders --------------------------------------------------------------------------------------------------------------
def borders(sources: Sources, floors: Sequence[Floor]) -> dict[str, Any]:
    found = imports.edges(sources)
    return {
        "imports, pairs of files": len(found),
        "that run up": len(imports.up_runs(sources, floors)),
        "circles on one floor": len(imports.circles(sources, floors)),
        "files in circles, over all floors": len(imports.entangled(found)),
        "files on no floor, floors' rooms without a file": len(imports.unplaced(sources, floors)),
        "private names of other files": len(private.uses(sources)),
        "private names of a base class in another file, through `self`": len(private.inherited(sources)),
        "re-exports outside of `__init__.py`": sum(len(shims.re_exports(s)) for s in sources.values() if not s.package),
    }


def measure(sources: Sources, floors: Sequence[Floor] = FLOORS) -> Numbers:
    found = list(functions(sources))
    known = classes(sources)
    return {
        "sizes": sizes(sources),
        "lines of a function": {"functions": len(found), **spread(found, length, middle=True)},
        "cyclomatic complexity": spread(found, complexity, middle=False),
        **{f"base class `{name}`": base_class(name, known) for name in BASES},
        "types": types(sources),
        "borders": borders(sources, floors),
    }


def table(numbers: Numbers) -> str:
    rows = [f"| {group} | {what} | {value} |" for group, values in numbers.items() for what, value in values.items()]
    return "\n".join(["| of | what | number |", "|---|---|---|", *rows])


def floors_of(path: Path) -> tuple[Floor, ...]:
    floors = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Floor(tuple(floor["rooms"]), floor.get("in_order", False)) for floor in floors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a markdown table")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--floors", type=Path, help="another table of floors, for another tree")
    given = parser.parse_args()
    numbers = measure(read(given.tree), floors_of(given.floors) if given.floors else FLOORS)
    print(json.dumps(numbers, indent=1) if given.json else table(numbers))


if __name__ == "__main__":
    main()
