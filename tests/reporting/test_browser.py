"""The page in a headless Chromium, without a network: figures are drawn, switches switch, tables sort and filter."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vl_convert")

from gradmaker.reporting import html
from tests.reporting.sample import ROWS, document

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = os.environ.get("GRADMAKER_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium: install the package chromium, or set GRADMAKER_CHROMIUM")


class Opened:
    """The page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_context(offline=True, **context).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.set_default_timeout(20_000)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def column(self, table: str, number: int) -> list[str]:
        return list(self.page.locator(f"#{table} tbody tr td:nth-child({number})").all_inner_texts())

    def lines(self, figure: str) -> int:
        """Drawn lines of rows."""
        return int(self.page.locator(f"#{figure} .mark-line path").count())

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html(document()), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path, viewport={"width": 1200, "height": 900}, color_scheme="light")
    yield opened
    opened.close()
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("blob:", "data:"))] == [path.as_uri()]


def test_every_figure_is_drawn(opened: Opened) -> None:
    page = opened.page
    assert page.evaluate("document.documentElement.dataset.drawn") == "4"
    for name, marks in {"loss": ".mark-line path", "pareto": ".mark-symbol path", "parts": ".mark-rect path"}.items():
        shapes = page.locator(f"#{name} {marks}")
        drawn = [shape for shape in shapes.all() if shape.bounding_box() and shape.bounding_box()["width"] > 1]
        assert len(drawn) >= (6 if name == "parts" else len(ROWS)), name
    assert page.locator("#errors .mark-text.role-mark text").all_text_contents().count("0.02") == 1
    assert "target" in page.locator("#pareto .plot").text_content()
    colours = page.evaluate(
        "[...document.querySelectorAll('#loss .mark-line path')].map(path => getComputedStyle(path).stroke)",
    )
    assert len(set(colours)) == len(colours) == len(ROWS)


def test_switches_of_rows(opened: Opened) -> None:
    """A click switches a row off in all figures at once, a second one on; all of them can be switched off."""
    page = opened.page
    key = page.locator("#loss .key").nth(1)
    key.click()
    page.wait_for_function("document.querySelectorAll('#loss .mark-line path').length == 19")
    assert key.get_attribute("aria-pressed") == page.locator("#pareto .key").nth(1).get_attribute("aria-pressed") == "false"
    assert page.locator("#parts .key[aria-pressed=true]").count() == 2
    key.press("Enter")
    page.wait_for_function("document.querySelectorAll('#loss .mark-line path').length == 20")
    for left in (0, 20):
        page.locator("#loss .all").click()
        page.wait_for_function(f"document.querySelectorAll('#loss .mark-line path').length == {left}")
        assert page.locator("#loss .key[aria-pressed=true]").count() == left
    page.locator("#loss .key").last.click()
    page.wait_for_function("document.querySelectorAll('#loss .mark-line path').length == 19")


def test_values_under_the_pointer(opened: Opened) -> None:
    page = opened.page
    for name, wanted in {
        "loss": r"row\s+method \d+.*step\s+10+\s.*loss\s+[\d.]+.*lowest.*highest",
        "pareto": r"row\s+.*accuracy\s+9\d\.\d%.*rate\s+0\.1",
        "parts": r"row\s+(forward|refresh).*ms\s+\d",
        "errors": r"relative error\s+0\.0\d",
    }.items():
        plot = page.locator(f"#{name} .plot")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        plot.hover(position={"x": box["width"] * 0.4, "y": 12 if name in ("parts", "errors") else 120})
        page.wait_for_selector("#vg-tooltip-element.visible")
        shown = page.locator("#vg-tooltip-element").inner_text()
        assert re.search(wanted, shown, re.DOTALL) and "undefined" not in shown, shown
        page.mouse.move(2, 2)
        page.wait_for_selector("#vg-tooltip-element.visible", state="hidden")


def test_tables_sort_by_number_and_filter(opened: Opened) -> None:
    page = opened.page
    heading = page.locator("#summary th").nth(2)
    assert opened.column("summary", 1) == ROWS
    heading.click()
    page.wait_for_selector("#summary th:nth-child(3)[aria-sort=ascending]")
    assert opened.column("summary", 3)[:3] == ["1 ms", "4 ms", "9 ms"]
    heading.click()
    page.wait_for_selector("#summary th:nth-child(3)[aria-sort=descending]")
    assert opened.column("summary", 1) == ROWS
    page.locator("#summary input").fill("edge")
    page.wait_for_function("document.querySelectorAll('#summary tbody tr').length == 4")
    assert opened.column("summary", 1) == ROWS[::5]


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_cut(browser: Any, path: Path, width: int) -> None:
    """Neither page nor figure is wider than the window; a wide table scrolls in its own frame, its first column stays."""
    opened = Opened(browser, path, viewport={"width": width, "height": 800})
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for svg in page.locator(".plot svg").all():
        box = svg.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    frame = page.locator("#summary .dt-layout-table")
    if width == 400:
        assert frame.evaluate("e => e.scrollWidth > e.clientWidth")
        frame.evaluate("e => e.scrollLeft = e.scrollWidth")
        assert page.locator("#summary td").first.bounding_box()["x"] >= 0
        last = page.locator("#summary th").last.bounding_box()
        assert last["x"] + last["width"] <= width
    opened.close()


def paper(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_light_and_dark(browser: Any, path: Path) -> None:
    """The system's colours, the switch against them, and white on paper."""
    for scheme in ("light", "dark"):
        opened = Opened(browser, path, color_scheme=scheme)
        page = opened.page
        light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 29)"
        assert paper(page) == (light if scheme == "light" else dark)
        stroke = "getComputedStyle(document.querySelector('#loss .mark-line path')).stroke"
        before = page.evaluate(stroke)
        page.locator("#theme-dark" if scheme == "light" else "#theme-light").check()
        assert paper(page) == (dark if scheme == "light" else light)
        assert page.evaluate(stroke) != before
        page.locator("#theme-dark").check()
        page.emulate_media(media="print")
        assert paper(page) == light
        assert page.evaluate(stroke) == "rgb(0, 112, 166)"
        assert not page.locator(".theme").is_visible() and not page.locator("#summary input").is_visible()
        opened.close()


def test_without_scripts_the_answer_and_tables_are_there(browser: Any, path: Path) -> None:
    page = browser.new_context(offline=True, java_script_enabled=False).new_page()
    page.goto(path.as_uri())
    assert page.locator(".answer").is_visible() and page.locator("noscript").inner_text()
    assert page.locator("#summary tbody tr").count() == len(ROWS)
    page.context.close()
