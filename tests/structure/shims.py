"""Files that hold nothing of their own, and names that are handed on from where they are not defined."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from tests.structure.sources import Source


def shims(sources: Mapping[str, Source]) -> list[str]:
    """Modules that only import, whatever they call it; a folder's ``__init__.py`` may."""
    return [s.path for s in sources.values() if not s.package and _hands_on(s.tree)]


def _hands_on(tree: ast.Module) -> bool:
    statements = list(_statements(tree.body))
    brought = imported(tree)
    return bool(brought) and all(_adds_nothing(node, brought) for node in statements)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, inside ``if`` and ``try`` too."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            handled = [s for handler in node.handlers for s in handler.body]
            yield from _statements(node.body + handled + node.orelse + node.finalbody)
        else:
            yield node


def _adds_nothing(node: ast.stmt, brought: set[str]) -> bool:
    """An import, a docstring, ``__all__``, ``pass``, or another name for what was imported."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if all(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
        return True
    value = node.value
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id in brought


def imported(tree: ast.Module) -> set[str]:
    """Names that imports bind in a module, but for those of ``__future__``."""
    found = [node for node in _statements(tree.body) if isinstance(node, ast.Import | ast.ImportFrom)]
    aliases = [a for node in found if getattr(node, "module", "") != "__future__" for a in node.names]
    return {alias.asname or alias.name.split(".")[0] for alias in aliases}


def re_exports(source: Source) -> list[str]:
    """Names that ``__all__`` lists, or ``import x as x`` marks, without a definition in the file."""
    brought = imported(source.tree)
    listed = [
        element.value
        for node in source.tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        for element in ast.walk(node.value)
        if isinstance(element, ast.Constant) and element.value in brought
    ]
    found = [node for node in _statements(source.tree.body) if isinstance(node, ast.Import | ast.ImportFrom)]
    marked = [alias.name for node in found for alias in node.names if alias.asname == alias.name]
    return sorted({*listed, *marked})


def stars(sources: Mapping[str, Source]) -> list[str]:
    """``from m import *``."""
    return [
        f"{source.path}:{node.lineno}"
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
