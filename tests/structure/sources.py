"""The library's sources as syntax trees, by the name under which each module is imported. Nothing of the library is run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "gradmaker"
FOLDERS = ("gradmaker", "curvature", "representations", "solvers")
"""Of the checkout; all but the first install inside of it."""


@dataclass(frozen=True)
class Source:
    """One file."""

    module: str  # gradmaker.curvature.base
    path: str  # curvature/base.py
    text: str
    tree: ast.Module

    @property
    def package(self) -> bool:
        return self.path.endswith("/__init__.py")


def parse(files: Mapping[str, str]) -> dict[str, Source]:
    """Sources by module, from texts by path."""
    made = (Source(module_of(path), path, text, ast.parse(text, path)) for path, text in files.items())
    return {source.module: source for source in made}


def read(root: Path = ROOT) -> dict[str, Source]:
    """The sources of a checkout."""
    found = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return parse({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in found})


def module_of(path: str) -> str:
    """``curvature/base.py`` is ``gradmaker.curvature.base``; a folder's ``__init__.py`` is the folder."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == LIBRARY else [LIBRARY, *parts])
