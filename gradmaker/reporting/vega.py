"""Vega-Lite specifications of figures, for the page and for files.

Reference: Satyanarayan et al., "Vega-Lite: A Grammar of Interactive Graphics", IEEE TVCG 2017.
"""

from collections.abc import Mapping, Sequence

from gradmaker.reporting.figure import Figure, HeatMap
from gradmaker.reporting.heat_map import fields
from gradmaker.reporting.look import FILE, Look, Spec, config
from gradmaker.reporting.series_marks import layers

VERSION = "6.1"  # of Vega-Lite; 6.4 shows undefined values at the nearest point (vega-lite, pull request 9707)
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
WIDTH = 520  # of a figure in a file


def spec(figure: Figure | HeatMap, slots: Mapping[str, int], look: Look) -> Spec:
    """The specification of a figure."""
    made = fields(figure, look) if isinstance(figure, HeatMap) else layers(figure, slots, look)
    fitted: Spec = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    size: Spec = {"width": WIDTH} if look.complete else fitted
    title: Spec = {"title": figure.title} if look.complete else {}
    return {"$schema": SCHEMA, "config": config(look), **size, **title, **made}


def beside(figures: Sequence[Figure | HeatMap], slots: Mapping[str, int]) -> Spec:
    """The specification of several figures side by side, as they are in files."""
    parts = [spec(figure, slots, FILE) for figure in figures]
    panels = [{key: part[key] for key in part if key not in ("$schema", "config")} | {"width": 380} for part in parts]
    return {"$schema": SCHEMA, "config": config(FILE), "hconcat": panels}
