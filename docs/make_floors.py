"""Draws docs/images/floors.svg, the picture of docs/architecture.md, from the table that the tests hold imports against."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.structure.floors import FLOORS, INIT, Floor  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "floors.svg"
TITLES = (
    "What is read and recorded",
    "Curvature: what is measured",
    "Representations: how it is held",
    "Solvers: how it is applied",
    "Plan, blocks, step",
    "Around a maker",
    "Makers",
    "Methods",
    "Optimizer and studies",
    "What a user starts",
)
"""Of the floors, from the ground."""
WIDTH, LEFT, BOX, GAP, PAD = 940, 250, 26, 8, 10  # pixels; LEFT: where the boxes begin
CHARACTER = 7.3  # width of one in the font of names
COLOURS = {"axis": "#cfe3f7", "folder": "#e9eef3", "module": "#ffffff"}


def kind(room: str) -> str:
    """Of what stands under ``gradmaker``: a folder of the checkout, a folder, a module."""
    if (ROOT / room).is_dir():
        return "axis"
    return "folder" if (ROOT / "gradmaker" / room).is_dir() else "module"


def shown(room: str) -> str:
    """As it is named in the picture."""
    name = "gradmaker/__init__" if room == INIT else room
    return name if kind(room) == "module" else name + "/"


def lines(floor: Floor) -> list[list[tuple[str, float, float]]]:
    """Rooms in rows, with the left side and the width of each; folders first, unless the order says which may import which."""
    rooms = floor.rooms if floor.in_order else sorted(floor.rooms, key=lambda room: (kind(room) == "module", room))
    rows: list[list[tuple[str, float, float]]] = [[]]
    x = float(LEFT)
    for room in rooms:
        width = CHARACTER * len(shown(room)) + 16
        if x + width > WIDTH - PAD and rows[-1]:
            rows.append([])
            x = LEFT
        rows[-1].append((room, x, width))
        x += width + GAP + (10 if floor.in_order else 0)
    return rows


def render(floors: Sequence[Floor] = FLOORS) -> str:
    """The picture: the highest floor on top."""
    body: list[str] = []
    y = PAD
    for number, (floor, title) in reversed([*enumerate(zip(floors, TITLES, strict=True))]):
        rows = lines(floor)
        height = len(rows) * (BOX + GAP) + GAP
        body.append(
            f'<rect x="{PAD}" y="{y}" width="{WIDTH - 2 * PAD}" height="{height}" rx="3" fill="#fafbfc" stroke="#c8d0d8"/>'
        )
        middle = y + height / 2 + 4
        body.append(f'<text x="{PAD + 12}" y="{middle:g}" class="n">{number}</text>')
        body.append(f'<text x="{PAD + 34}" y="{middle:g}">{escape(title)}</text>')
        for j, row in enumerate(rows):
            body += boxes(row, y + GAP + j * (BOX + GAP), floor.in_order, j + 1 < len(rows))
        y += height + 4
    body.append(f'<text x="{PAD + 12}" y="{y + 16}">{escape(LEGEND)}</text>')
    size = f'width="{WIDTH}" height="{y + 28}" viewBox="0 0 {WIDTH} {y + 28}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="The floors of gradmaker">'
    return "\n".join([head, STYLE, f'<rect width="{WIDTH}" height="{y + 28}" fill="#ffffff"/>', *body, "</svg>"]) + "\n"


LEGEND = (
    "A file imports from its own floor and from floors below, never from above. On floor 0 it imports from the left (›) alone."
)
STYLE = (
    "<style>text { font: 13px Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #1c2733 } "
    ".n { font-weight: bold } .m { font: 12px Menlo, Consolas, 'DejaVu Sans Mono', monospace }</style>"
)


def boxes(row: Sequence[tuple[str, float, float]], y: float, in_order: bool, further: bool) -> Iterator[str]:
    """The rooms of one row.  further: whether another row follows"""
    for j, (room, x, width) in enumerate(row):
        fill = COLOURS[kind(room)]
        yield f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="3" fill="{fill}" stroke="#8594a3"/>'
        yield f'<text x="{x + 8:g}" y="{y + 17:g}" class="m">{escape(shown(room))}</text>'
        if in_order and (further or j + 1 < len(row)):
            yield f'<text x="{x + width + 5:g}" y="{y + 17:g}">›</text>'


if __name__ == "__main__":
    PICTURE.write_text(render(), encoding="utf-8")
