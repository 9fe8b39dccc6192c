"""What the pages say in tables and links, held against the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from gradmaker import METHODS, GradientConfig, PreconditionedGradientMaker
from tests.docs.test_readme import PAGES, blocks

ROOT = Path(__file__).resolve().parents[2]
PRECONDITIONED = {name: make for name, make in METHODS.items() if issubclass(make, PreconditionedGradientMaker)}
NAMED = [name for name in PRECONDITIONED if name != "custom"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def script(path: Path) -> ModuleType:
    """The script as a module; its folder comes first in the search for what it imports, as when Python runs it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


# --- methods and options --------------------------------------------------------------------------------------------------
def test_pages_of_methods_are_current() -> None:
    generated = script(ROOT / "docs" / "make_methods.py")
    pages = generated.pages()
    assert set(pages) == {generated.PAGE, *generated.FOLDER.glob("*.md")}
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, "run python docs/make_methods.py"


def test_every_method_says_when_it_helps_and_what_it_costs() -> None:
    for name in METHODS:
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
        helps, costs = page.split("## When it helps\n")[1].split("## What it costs\n")
        assert helps.strip() and costs.strip(), name


def test_pages_of_measurements_are_current() -> None:
    """Each number of docs/which.md and docs/experiments.md is that of a committed output."""
    generated = script(ROOT / "docs" / "make_pages.py")
    for name in generated.PAGES:
        assert generated.target(name).read_text(encoding="utf-8") == generated.render(name), "run python docs/make_pages.py"


def test_the_taxonomy_names_every_part() -> None:
    generated = script(ROOT / "docs" / "make_taxonomy.py")
    text = generated.PAGE.read_text(encoding="utf-8")
    assert text == generated.render(), "run python docs/make_taxonomy.py"
    assert all(f"| [`{part}`](" in text for parts in generated.AXES.values() for part in parts)


def test_the_reference_is_current() -> None:
    generated = script(ROOT / "docs" / "make_reference.py")
    pages = generated.pages()
    assert set(pages) == {generated.PAGE, *generated.FOLDER.glob("*.md")}
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, "run python docs/make_reference.py"


@pytest.mark.parametrize("name", NAMED)
def test_every_method_names_its_source(name: str) -> None:
    reference = script(ROOT / "docs" / "make_methods.py").reference(name)
    assert re.search(r"(19|20)\d\d", reference), f"{name}: no source with a year in the docstring of its config"


def test_options_of_all_methods_are_described() -> None:
    """A row gives one default for all of its options, or one for each."""
    page = (ROOT / "docs" / "using.md").read_text(encoding="utf-8").split("## Options of all methods")[1].split("\n##")[0]
    described: dict[str, str] = {}
    for keys, defaults, _ in (cells(line) for line in page.splitlines() if line.startswith("| `")):
        names, values = code(keys), defaults.replace("`", "").split(", ")
        described |= dict(zip(names, values if len(values) == len(names) else values * len(names), strict=True))
    assert set(described) == {f.name for f in fields(GradientConfig)}
    for f in fields(GradientConfig):
        assert described[f.name] in ("by method", repr(f.default).replace("'", '"')), f.name


# --- generated and linked -------------------------------------------------------------------------------------------------
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


def test_yaml_blocks_are_rows_or_options(tmp_path: Path) -> None:
    """Rows of methods, or files of options, which `gradmaker compare --config` reads and prints."""
    pytest.importorskip("typer")
    import yaml
    from typer.testing import CliRunner

    from gradmaker.commands.app import app
    from gradmaker.compare.parsing import parse_rows

    found = [block for page in PAGES for block in blocks(page) if block.label == "yaml"]
    assert found
    for block in found:
        path = tmp_path / "methods.yaml"
        path.write_text(block.text, encoding="utf-8")
        content = yaml.safe_load(block.text)
        if isinstance(content, dict) and {"methods", "tuning"} & content.keys():
            printed = CliRunner().invoke(app, ["compare", "--config", str(path), "--print-config"])
            assert printed.exit_code == 0, printed.output
            assert content.keys() <= yaml.safe_load(printed.output).keys()
            continue
        for row in parse_rows([path]):
            row.build_maker(nn.Linear(3, 2))
