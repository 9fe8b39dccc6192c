"""The page of the gallery has the numbers of its outputs."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tables_of_the_page_are_those_that_were_measured() -> None:
    spec = spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    assert spec is not None and spec.loader is not None
    generated = module_from_spec(spec)
    spec.loader.exec_module(generated)
    assert generated.PAGE.read_text(encoding="utf-8") == generated.render(), "run python docs/make_gallery.py"
    assert all(f"<!-- {name} -->" in generated.render() for name in generated.tables())
