"""Colours, fonts and numbers of figures: for the page, whose CSS variables they are, and for files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradmaker.reporting.palette import colour

Spec = dict[str, Any]
FONT = '-apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
BAND = 22  # pixels for a name on the y axis of a figure
PLAIN = "{0} != 0 && (abs({0}) < 1e-3 || abs({0}) >= 1e7) ? format({0}, '.3~e') : format({0}, ',.6~r')"


@dataclass(frozen=True)
class Look:
    """Colours and fonts of a figure, and whether it has a legend and title of its own."""

    ink: str
    soft: str
    line: str
    font: str
    row: Callable[[int], str]
    complete: bool


PAGE = Look("var(--ink)", "var(--soft)", "var(--line)", FONT, lambda slot: f"var(--row-{slot % 20})", False)
FILE = Look("#1c2430", "#5b6675", "#dfe4ea", FONT, colour, True)


def config(look: Look) -> Spec:
    """The configuration of Vega-Lite."""
    axis = {
        "labelColor": look.soft,
        "titleColor": look.soft,
        "gridColor": look.line,
        "domainColor": look.soft,
        "tickColor": look.soft,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    }
    return {
        "font": look.font,
        "background": "#ffffff" if look.complete else "transparent",
        "axis": axis,
        "view": {"stroke": None},
        "line": {"strokeWidth": 2},
        "bar": {"cornerRadius": 1},
        "title": {"anchor": "start", "color": look.ink, "fontSize": 13},
        "legend": {"labelColor": look.ink, "titleColor": look.soft, "labelFontSize": 11, "labelLimit": 220},
        "text": {"color": look.soft, "fontSize": 11},
    }


def written(value: str, format_: str) -> str:
    """The expression of a number as text: in its format, else plain, or by powers for very small and large ones."""
    return f"format({value}, '{format_}')" if format_ else PLAIN.format(value)
