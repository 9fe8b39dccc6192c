"""Draws the pictures of docs/compare.md, the report of docs/data/report.json in light, dark and on a phone, by a Chromium."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from gradmaker.reporting import Document, html  # noqa: E402

SOURCE = DOCS / "data" / "report.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEWS: dict[str, dict[str, Any]] = {  # colours, width of the window, where the picture begins, its height
    "light": {"scheme": "light", "width": 1080, "top": "header", "height": 1450},
    "dark": {"scheme": "dark", "width": 1080, "top": "section:has(#front_seconds)", "height": 620},
    "phone": {"scheme": "light", "width": 400, "top": "header", "height": 960},
}


def draw(page: Any, view: dict[str, Any], path: Path) -> None:
    """A picture of a part of the open page."""
    from PIL import Image

    box = page.locator(view["top"]).first.bounding_box()
    clip = {"x": 0, "y": max(0, box["y"] - 24), "width": view["width"], "height": view["height"]}
    shot = page.screenshot(full_page=True, clip=clip)
    Image.open(io.BytesIO(shot)).convert("RGB").save(path, optimize=True)


def main() -> None:
    """Write the page of the document anew and draw it."""
    from playwright.sync_api import sync_playwright

    binary = os.environ.get("GRADMAKER_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        sys.exit("no Chromium: install the package chromium, or set GRADMAKER_CHROMIUM")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        file.write_text(html(Document.from_json(SOURCE.read_text(encoding="utf-8"))), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            page = browser.new_page(color_scheme=view["scheme"], viewport={"width": view["width"], "height": 900})
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-drawn]", state="attached")
            draw(page, view, DOCS / "images" / f"report-{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
