"""The page without a browser: its structure, what it holds, what it does not ask for; files and Markdown."""

from __future__ import annotations

import base64
import doctest
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("vl_convert")

import gradmaker.reporting
from gradmaker.reporting import Axis, Document, Figure, Section, Series, extra, html, markdown, write, write_picture
from tests.reporting.sample import ROWS, document

VOID = ("meta", "link", "input", "br", "hr", "img", "line")


class Structure(HTMLParser):
    """Tags that are open, ids, and text by element."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []
        self.addresses: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture(scope="module")
def page() -> str:
    return html(document())


def test_structure(page: str) -> None:
    found = Structure(page)
    assert found.wrong == [] and found.open == []
    assert len(set(found.ids)) == len(found.ids)
    assert found.addresses == ["data:,"]
    assert "&#" not in page.split("<style>")[1].split("</style>")[0]
    assert found.text["title"] == [document().title] == found.text["h1"]
    headings = ["Summary", "Figures", "More", "How it was measured", "Machine and versions", "Run it again"]
    assert found.text["h2"] == headings
    body = page.split('<section class="answer"')[1]
    assert body.index(document().answer[0]) < body.index("<table")
    assert found.text["button"].count(ROWS[-1]) == 2 and ROWS[-1] in found.text["td"]


def test_scripts_are_packed_and_ask_for_nothing(page: str) -> None:
    """Vega-Embed and DataTables are in the file; what is left of it names no address but that of a schema."""
    packed = dict(re.findall(r'<script type="text/plain" id="bundle-(\w+)">([^<]*)</script>', page))
    bundles = {name: gzip.decompress(base64.b64decode(text)).decode() for name, text in packed.items()}
    assert "vegaEmbed" in bundles["figures"] and "ITable" in bundles["tables"]
    rest = re.sub(r'<script type="text/plain".*?</script>', "", page)
    assert set(re.findall(r"(?:https?|wss?)://[^\"' ]*", rest)) == {"https://vega.github.io/schema/vega-lite/v6.json"}
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket", rest)
    assert len(page.encode()) < 900_000


def test_specifications_are_data(page: str) -> None:
    specs = {name: json.loads(text) for name, text in re.findall(r'id="spec-(\w+)">(.*?)</script>', page)}
    assert list(specs) == ["loss", "pareto", "parts", "errors"]
    assert len(specs["loss"]["data"]["values"]) == len(ROWS) * 4
    assert specs["loss"]["encoding"]["color"]["scale"]["range"] == [f"var(--row-{k})" for k in range(20)]
    assert not any("<" in text for text in re.findall(r'id="spec-\w+">(.*)</script>', page))


def test_a_page_holds_what_it_needs_only() -> None:
    figure = Figure("f", "F", Axis("x"), Axis("y"), [Series("a", [1, 2], [1, 2])])
    text = html(Document("D", ["a"], [Section("S", [])]))
    assert 'id="bundle-' not in text and len(text) < 20_000
    drawn = html(Document("D", ["a"], [Section("S", [figure])]))
    assert 'id="bundle-figures"' in drawn and 'id="bundle-tables"' not in drawn


def test_files(tmp_path: Path) -> None:
    made = document()
    paths = write(made, tmp_path / "new" / "folder", name="compare")
    assert {kind: path.name for kind, path in paths.items() if kind in ("html", "markdown", "json")} == {
        "html": "compare.html",
        "markdown": "compare.md",
        "json": "compare.json",
    }
    assert Document.from_json(paths["json"].read_text(encoding="utf-8")).to_json() == made.to_json()
    for name in ("loss", "pareto", "parts", "errors"):
        picture = paths[f"{name}.svg"].read_text(encoding="utf-8")
        assert picture.startswith("<svg") and "var(" not in picture
        assert paths[f"{name}.pdf"].read_bytes().startswith(b"%PDF")
    drawn = paths["loss.svg"].read_text(encoding="utf-8")
    assert all(name in drawn for name in ROWS[:-1]) and "Training loss" in drawn and "#0070a6" in drawn
    picture_path = tmp_path / "overview.png"
    write_picture(made, ["loss", "pareto"], picture_path)
    assert picture_path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="lost: no such figure: legal are loss, pareto, parts, errors"):
        write_picture(made, ["lost"], picture_path)


def test_markdown() -> None:
    text = markdown(document())
    assert text.startswith("# Twenty methods </script> on digits\n\n20 methods\n\n**Interrupted.**\n\n**Method 1 reaches")
    assert "| method 1 | 90.40 ± 0.20 % | 361 ms | 1.91 MiB | 1.10 |  |" in text
    assert "![Training loss](figures/loss.svg)" in text and "All trainings" not in text
    assert text.endswith("## Run it again\n\n```\ngradmaker compare 'a b'\n```\n")


def test_the_snippet_of_the_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = doctest.testmod(gradmaker.reporting)
    assert done.attempted > 5 and done.failed == 0
    assert (tmp_path / "runs" / "example" / "figures" / "loss.svg").exists()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extra.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(ImportError, match=r"a report needs no-such-package: pip install 'gradmaker\[compare\]'"):
        html(document())
