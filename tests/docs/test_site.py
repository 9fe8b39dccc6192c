"""The site builds with every warning an error and without a network, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_readme import ROOT

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
