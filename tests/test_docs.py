"""What the pages say in tables and links, held against the code."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from gradmaker import METHODS, GradientConfig, PreconditionedGradientMaker
from tests.test_readme import PAGES, blocks

ROOT = Path(__file__).resolve().parents[1]
EXPONENTS = {-1.0: "-1", -0.5: "-1/2"}
PRECONDITIONED = {name: make for name, make in METHODS.items() if issubclass(make, PreconditionedGradientMaker)}
NAMED = [name for name in PRECONDITIONED if name != "custom"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def method_table() -> dict[str, list[str]]:
    """Rows of the README's table of methods, by name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Methods")[1].split("\n## ")[0]
    rows = [cells(line) for line in text.splitlines() if line.startswith("| `")]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0].strip("`"): row[1:] for row in rows}


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


# --- the table of methods -------------------------------------------------------------------------------------------------
def test_method_table_has_every_method() -> None:
    table = method_table()
    assert list(table) == list(METHODS)
    assert {name: code(row[0]) for name, row in table.items()} == {name: [make.__name__] for name, make in METHODS.items()}


@pytest.mark.parametrize("name", NAMED)
def test_method_table_names_the_parts(name: str) -> None:
    maker = PRECONDITIONED[name](nn.Linear(3, 2))
    triple = maker.plan.blocks[0].triple
    _, parts, exponent, *_ = method_table()[name]
    assert code(parts) == [type(part).__name__ for part in (triple.curvature, triple.representation, triple.solver)]
    assert exponent == EXPONENTS[triple.solver.exponent]


@pytest.mark.parametrize("name", NAMED)
def test_method_table_names_the_defaults(name: str) -> None:
    """Damping, decay, and every option that a method has of its own or starts from elsewhere."""
    common = {f.name: f.default for f in fields(GradientConfig)}
    config: Any = PRECONDITIONED[name].Config()
    shown = ["damping", "decay"]
    shown += [f.name for f in fields(config) if common.get(f.name, MISSING) != getattr(config, f.name) and f.name not in shown]
    assert sorted(code(method_table()[name][3])) == sorted(f"{key}={getattr(config, key)!r}" for key in shown)


def test_options_of_all_methods_are_described() -> None:
    """A row gives one default for all of its options, or one for each."""
    page = (ROOT / "docs" / "using.md").read_text(encoding="utf-8").split("## Options of all methods")[1].split("\n## ")[0]
    described: dict[str, str] = {}
    for keys, defaults, _ in (cells(line) for line in page.splitlines() if line.startswith("| `")):
        names, values = code(keys), defaults.replace("`", "").split(", ")
        described |= dict(zip(names, values if len(values) == len(names) else values * len(names), strict=True))
    assert set(described) == {f.name for f in fields(GradientConfig)}
    for f in fields(GradientConfig):
        assert described[f.name] in ("by method", repr(f.default).replace("'", '"')), f.name


# --- generated and linked -------------------------------------------------------------------------------------------------
def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_legality_page_is_current() -> None:
    generated = script(ROOT / "docs" / "make_legality.py")
    assert generated.PAGE.read_text(encoding="utf-8") == generated.render(), "run python docs/make_legality.py"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), f"{page.name}: {target} does not exist"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target} has no such heading"


def test_yaml_blocks_are_rows(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from gradmaker.compare.rows import parse_rows

    found = [block for page in PAGES for block in blocks(page) if block.label == "yaml"]
    assert found
    for block in found:
        path = tmp_path / "methods.yaml"
        path.write_text(block.text, encoding="utf-8")
        for row in parse_rows([path]):
            row.build_maker(nn.Linear(3, 2))
