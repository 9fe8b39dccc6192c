"""The files of a report: the page, its data, and every figure as SVG and PDF."""

import json
from pathlib import Path

from gradmaker.reporting.document import Document
from gradmaker.reporting.extra import require_extra
from gradmaker.reporting.look import FILE
from gradmaker.reporting.page import html
from gradmaker.reporting.vega import VERSION, spec

FIGURES = "figures"


def write(document: Document, folder: Path | str, name: str = "report", figures: bool = True) -> dict[str, Path]:
    """Write ``name.html``, ``name.json`` and, with `figures`, ``figures/*.svg`` and ``*.pdf``; returns the paths by name."""
    require_extra()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = {"html": out / f"{name}.html", "json": out / f"{name}.json"}
    paths["html"].write_text(html(document), encoding="utf-8")
    paths["json"].write_text(document.to_json(), encoding="utf-8")
    return paths | (write_figures(document, out / FIGURES) if figures else {})


def write_figures(document: Document, folder: Path) -> dict[str, Path]:
    """Every figure as SVG and PDF, on white, with its legend; returns the paths by file name."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    slots = document.slots()
    for figure in document.figures:
        vector = vl_convert.vegalite_to_svg(json.dumps(spec(figure, slots, FILE)), vl_version=VERSION)
        paths[f"{figure.name}.svg"], paths[f"{figure.name}.pdf"] = (folder / f"{figure.name}.{kind}" for kind in ("svg", "pdf"))
        paths[f"{figure.name}.svg"].write_text(vector, encoding="utf-8")
        paths[f"{figure.name}.pdf"].write_bytes(vl_convert.svg_to_pdf(vector))
    return paths
