"""The files of a report: the page, its data, Markdown, every figure as SVG and PDF, and pictures of several figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from gradmaker.reporting.document import Document
from gradmaker.reporting.extra import require_extra
from gradmaker.reporting.look import FILE
from gradmaker.reporting.markdown import markdown
from gradmaker.reporting.page import html
from gradmaker.reporting.vega import VERSION, beside, spec

FIGURES = "figures"


def write(document: Document, folder: Path | str, name: str = "report", figures: bool = True) -> dict[str, Path]:
    """Write ``name.html``, ``.md`` and ``.json`` and, with `figures`, ``figures/*.svg`` and ``*.pdf``; returns their paths."""
    require_extra()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    texts = {"html": (f"{name}.html", html(document)), "markdown": (f"{name}.md", markdown(document))}
    texts["json"] = f"{name}.json", document.to_json()
    for file, text in texts.values():
        (out / file).write_text(text, encoding="utf-8")
    paths = {kind: out / file for kind, (file, _) in texts.items()}
    return paths | (write_figures(document, out / FIGURES) if figures else {})


def write_figures(document: Document, folder: Path) -> dict[str, Path]:
    """Every figure as SVG and PDF, on white, with its legend; returns the paths by file name."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    slots = document.slots()
    for figure in document.figures:
        vector = vl_convert.vegalite_to_svg(json.dumps(spec(figure, slots, FILE)), vl_version=VERSION)
        svg, pdf = (folder / f"{figure.name}.{kind}" for kind in ("svg", "pdf"))
        svg.write_text(vector, encoding="utf-8")
        pdf.write_bytes(vl_convert.svg_to_pdf(vector))
        paths |= {svg.name: svg, pdf.name: pdf}
    return paths


def write_picture(document: Document, names: Sequence[str], path: Path) -> None:
    """One PNG of several figures side by side, with one legend. ValueError for a name that is no figure's."""
    import vl_convert

    known = {figure.name: figure for figure in document.figures}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: no such figure: legal are {', '.join(known)}")
    made = beside([known[name] for name in names], document.slots())
    path.write_bytes(vl_convert.vegalite_to_png(json.dumps(made), vl_version=VERSION, scale=1.3))
