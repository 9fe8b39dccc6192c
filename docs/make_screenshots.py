"""Takes pictures of the built site in light, dark and at the width of a phone: docs/images/site/*.png, by headless Chromium.

python docs/make_screenshots.py        after `mkdocs build --strict`
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SITE, FOLDER = ROOT / "build" / "site", ROOT / "docs" / "images" / "site"
COMMAND = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
DARK = "--blink-settings=preferredColorScheme=0"
SHOTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "light": ("index.html", "1280,1000", ()),
    "dark": ("index.html", "1280,1000", (DARK,)),
    "phone": ("which.html", "500,1000", ()),
    "coming_from_dark": ("coming_from.html", "1280,1400", (DARK,)),
    "method": ("methods/kfac.html", "1280,1400", ()),
}
COLOURS = 48  # enough for text and lines; a picture stays below 60 kB


def shoot(page: str, size: str, options: tuple[str, ...], target: Path) -> None:
    """One picture, in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "taken.png"
        url = (SITE / page).as_uri()
        command = [*COMMAND, *options, f"--window-size={size}", f"--screenshot={taken}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        Image.open(taken).convert("RGB").quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    if not (SITE / "index.html").is_file():
        sys.exit("there is no site: run mkdocs build --strict first")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, shot in SHOTS.items():
        shoot(*shot, FOLDER / f"{name}.png")
