"""Which module imports which: anywhere in a file, for typing and inside functions too. What runs up, what runs in a circle."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.structure.floors import Floor, Plan
from tests.structure.sources import LIBRARY, Source


@dataclass(frozen=True, order=True)
class Edge:
    """The first import of a module by another."""

    importer: str
    imported: str
    line: int


def edges(sources: Mapping[str, Source]) -> list[Edge]:
    """One for each pair of modules."""
    found: dict[tuple[str, str], int] = {}
    for source in sources.values():
        for name, line in _imported(source):
            target = _known(name, sources)
            if target is not None and target != source.module:
                line = min(line, found.get((source.module, target), line))
                found[source.module, target] = line
    return sorted(Edge(*pair, line) for pair, line in found.items())


def _imported(source: Source) -> Iterator[tuple[str, int]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(source, node)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _imports_by_name(node.func):
            yield from (
                (a.value, node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def _base(source: Source, node: ast.ImportFrom) -> str:
    """The package that names are imported from."""
    if not node.level:
        return node.module or ""
    package = source.module.split(".") if source.package else source.module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def _imports_by_name(function: ast.expr) -> bool:
    name = function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    return name.lstrip("_") in ("import_module", "import__")


def _known(name: str, modules: Collection[str]) -> str | None:
    """The module that a dotted name leads to: ``gradmaker.maker`` for ``gradmaker.maker.GradientMaker``."""
    parts = name.split(".")
    if parts[0] != LIBRARY:
        return None
    return next((m for k in range(len(parts), 0, -1) if (m := ".".join(parts[:k])) in modules), None)


# --- floors ---------------------------------------------------------------------------------------------------------------
def up_runs(sources: Mapping[str, Source], floors: Sequence[Floor]) -> list[str]:
    """Imports of a higher floor, or of a later room of a floor that is in order."""
    plan, said = Plan(floors), []
    for edge in edges(sources):
        here, there = plan.place(edge.importer), plan.place(edge.imported)
        if here and there and there.height > here.height:
            to = f"{edge.imported} (floor {there.floor}, {there.room})"
            said.append(f"{sources[edge.importer].path}:{edge.line} (floor {here.floor}, {here.room}) imports {to}")
    return said


def unplaced(sources: Mapping[str, Source], floors: Sequence[Floor]) -> list[str]:
    """Files that the table does not place, and rooms of the table in which no file stands."""
    plan = Plan(floors)
    places = {source.path: plan.place(module) for module, source in sources.items()}
    used = {place.room for place in places.values() if place}
    files = [f"{path}: stands on no floor" for path, place in places.items() if place is None]
    return files + [
        f"{room}: no such file or folder, though floor {plan.rooms[room].floor} names it" for room in plan.rooms.keys() - used
    ]


def circles(sources: Mapping[str, Source], floors: Sequence[Floor]) -> list[str]:
    """Circles of files that stand on one floor; what runs in a circle over several floors runs up somewhere."""
    plan = Plan(floors)
    level = [
        e for e in edges(sources) if (a := plan.place(e.importer)) and (b := plan.place(e.imported)) and a.floor == b.floor
    ]
    return [" -> ".join(circle) for circle in loops(level)]


def loops(found: Iterable[Edge]) -> list[list[str]]:
    """A shortest circle of each set of modules that all import one another, first module first and last."""
    targets = _targets(found)
    seen: set[str] = set()
    made = []
    for module in sorted(targets):
        if module not in seen and (circle := _shortest(module, targets)):
            made.append(circle)
            ahead = _reached(module, targets)
            seen |= {other for other in ahead if module in _reached(other, targets)}
    return made


def entangled(found: Iterable[Edge]) -> set[str]:
    """Modules from which a way leads back to themselves."""
    targets = _targets(found)
    return {module for module in targets if module in _reached(module, targets)}


def _targets(found: Iterable[Edge]) -> dict[str, list[str]]:
    targets: dict[str, list[str]] = {}
    for edge in found:
        targets.setdefault(edge.importer, []).append(edge.imported)
    return targets


def _reached(start: str, targets: Mapping[str, list[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(targets.get(start, ()))
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += targets.get(module, ())
    return reached


def _shortest(start: str, targets: Mapping[str, list[str]]) -> list[str] | None:
    """From a module to itself; None if no way leads back."""
    ways, visited = [[start]], {start}
    while ways:
        further = []
        for way in ways:
            for target in targets.get(way[-1], ()):
                if target == start:
                    return [*way, start]
                if target not in visited:
                    visited.add(target)
                    further.append([*way, target])
        ways = further
    return None
