"""Colours of rows: twenty for light and twenty for dark paper, and the looks of the figures that matplotlib draws."""

from typing import Any

# Farthest points of OKLab (Ottosson 2020) with a contrast of at least 3 to the paper: any two are 0.1 or more apart on both.
LIGHT = tuple(
    "#0070a6 #cc6004 #118659 #b54d98 #58290a #540096 #df59fc #5d164b #99007a #006129 "
    "#725e24 #3c4a4f #4a9aa7 #736f7c #c11435 #91922f #6b4e9a #890120 #03409c #37a711".split()
)
DARK = tuple(
    "#64bcf7 #febc97 #6fd3a1 #ffa0e0 #a77254 #9d63ed #f8ddfe #af6297 #ef66c8 #5dae71 "
    "#bda86e #849499 #95e5f3 #bdb9c6 #ff8c8d #dadd7c #b698ea #e16167 #538ef1 #87f46e".split()
)
PAPER = ("#ffffff", "#14181d")
PATTERNS: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 2, 2, 2))
SOLID = 7  # rows whose lines are not dashed; patterns tell rows apart in grey, too


def colour(slot: int) -> str:
    """The colour of a slot on light paper; after twenty they come again."""
    return LIGHT[slot % len(LIGHT)]


def pattern(slot: int) -> list[int]:
    """Lengths of dashes and gaps in pixels; empty: a solid line."""
    return list(PATTERNS[slot // SOLID % len(PATTERNS)])


# What matplotlib draws beside the reports, in the same looks.
GREY = "#6E6E6E"  # of references
DASHES = ("-", "--", ":", "-.")
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
}
