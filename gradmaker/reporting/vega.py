"""Vega-Lite specifications of figures, for the page and for files.

Reference: Satyanarayan et al., "Vega-Lite: A Grammar of Interactive Graphics", IEEE TVCG 2017.
"""

from collections.abc import Mapping

from gradmaker.reporting.figure import Figure, HeatMap
from gradmaker.reporting.heat_map import fields
from gradmaker.reporting.look import Look, Spec, config
from gradmaker.reporting.series_marks import layers

VERSION = "6.1"  # of Vega-Lite; 6.4 shows undefined values at the nearest point (vega-lite, pull request 9707)
WIDTH = 520  # of a figure in a file


def spec(figure: Figure | HeatMap, slots: Mapping[str, int], look: Look) -> Spec:
    """The specification of a figure."""
    made = fields(figure, look) if isinstance(figure, HeatMap) else layers(figure, slots, look)
    fitted: Spec = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    size: Spec = {"width": WIDTH} if look.complete else fitted
    title: Spec = {"title": figure.title} if look.complete else {}
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "config": config(look), **size, **title, **made}
