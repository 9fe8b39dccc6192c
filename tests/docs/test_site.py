"""The site builds with every warning an error and without a network, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.test_docs import anchors
from tests.docs.test_readme import ROOT, blocks

pytest.importorskip("mkdocs")
pytest.importorskip("material")

OFFLINE = """
import socket, sys
def refuse(*_):
    raise OSError("the site must build without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-c", OFFLINE, str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are files of the site: it can be read from a disk."""
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|source|iframe)[^>]*\ssrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*\srel=\"?(?:stylesheet|icon|preload|preconnect)[^>]*\shref=\"?([^\s\">]+)", text)
        assert loaded
        for link in loaded:
            if not link.startswith("data:"):
                assert "//" not in link, f"{page.name} loads {link}"
                assert (page.parent / link.partition("?")[0]).resolve().is_file(), f"{page.name}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\"?https?:|@import \"?https?:", style.read_text(encoding="utf-8")), style.name


# --- the ways through it --------------------------------------------------------------------------------------------------
PATH = ("README.md", "docs/quick_start.md", "docs/which.md", "docs/compare.md")
"""Of a newcomer: the README, one's own model, the choice of a method, the report."""
STEPS = {
    "docs/quick_start.md": ("1. Install", "2. Change one line", "6. Compare on your model"),
    "docs/which.md": ("Decide", "What a step costs"),
    "docs/compare.md": ("A task of your own", "What is written"),
}


def links(page: Path) -> set[Path]:
    """The files that a page links to."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text))
    return {(page.parent / link).resolve() for link in found if link and "://" not in link}


@pytest.mark.parametrize("place", range(len(PATH)))
def test_the_path_of_a_newcomer(place: int) -> None:
    """Each page leads to the next, shows something that runs, and sends nobody to the source."""
    page = ROOT / PATH[place]
    assert not [link for link in links(page) if link.suffix == ".py"]
    assert page.name == "which.md" or any(block.label == "python" for block in blocks(page))
    if place + 1 < len(PATH):
        assert ROOT / PATH[place + 1] in links(page)
    for step in STEPS.get(PATH[place], ()):
        assert re.sub(r"[^\w\- ]", "", step.lower()).replace(" ", "-") in anchors(page)


def test_the_own_model_comes_to_a_report() -> None:
    """The blocks of the quick start make an optimizer of a model, and the report of a comparison on its data."""
    text = "\n".join(block.text for block in blocks(ROOT / "docs" / "quick_start.md") if block.label == "python")
    assert text.index("gradmaker.optimizer(model") < text.index("compare(") < text.index('result.files["html"]')


def test_pages_outside_of_the_navigation_are_linked_from_it() -> None:
    """The build itself demands that every other page has its place there."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = {ROOT / "docs" / name for name in re.findall(r"[-:] ([\w/]+\.md)$", config, re.MULTILINE)}
    assert len(shown) > 100
    linked = {link for page in shown if page.is_file() for link in links(page)}
    pages = set((ROOT / "docs").glob("**/*.md"))
    assert not {page.relative_to(ROOT).as_posix() for page in pages - shown - linked}


def test_nothing_is_lost_between_source_and_page() -> None:
    """The site renders no TeX, and reads a name in angle brackets as HTML unless it is code."""
    for page in (ROOT / "docs").glob("**/*.md"):
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"\$[^$\n]*\\[a-zA-Z]+[^$\n]*\$|/<\w+>|/[\w-]*-<\w+>", prose), page.name


def test_citation_names_the_version() -> None:
    import gradmaker

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == gradmaker.__version__ and cited["license"] == "MIT" and cited["cff-version"] == "1.2.0"
