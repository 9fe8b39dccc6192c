"""The Vega-Lite layers of a heat map: fields of colour, with their numbers where there are few."""

import math

from gradmaker.reporting.figure import HeatMap
from gradmaker.reporting.look import BAND, Look, Spec

LABELLED = 150  # most fields of a heat map that have their number written in


def fields(figure: HeatMap, look: Look) -> Spec:
    """The parts of the specification that are about fields."""
    values = [
        {"x": x, "y": y, "value": value}
        for y, line in zip(figure.y, figure.values, strict=True)
        for x, value in zip(figure.x, line, strict=True)
    ]
    colours: Spec = {"type": figure.scale, "scheme": "viridis"}
    if figure.limits is not None:
        colours |= {"domain": list(figure.limits), "clamp": True}
    legend = {"title": figure.quantity, "orient": "bottom", "gradientLength": 200, "format": figure.format}
    shade = {"field": "value", "type": "quantitative", "scale": colours, "legend": legend}
    told = {"field": "value", "title": figure.quantity, "format": figure.format, "type": "quantitative"}
    tooltip = [{"field": "y", "title": figure.y_title or "y"}, {"field": "x", "title": figure.x_title or "x"}, told]
    layers: list[Spec] = [{"mark": {"type": "rect", "invalid": None}, "encoding": {"color": shade}}]
    if len(values) <= LABELLED:
        dark = {"condition": {"test": f"datum.value > {_middle(figure)}", "value": "#000000"}, "value": "#ffffff"}
        text = {"field": "value", "type": "quantitative", "format": figure.format}
        layers.append({"mark": {"type": "text", "fontSize": 11}, "encoding": {"text": text, "color": dark}})
    return {
        "height": BAND * len(figure.y),
        "data": {"values": values},
        "transform": [{"filter": "datum.value != null"}],
        "encoding": {
            "tooltip": tooltip,
            "x": {**_name_axis(figure.x_title, [*figure.x]), "field": "x"},
            "y": {**_name_axis(figure.y_title, [*figure.y]), "field": "y"},
        },
        "layer": layers,
    }


def _name_axis(title: str, names: list[str]) -> Spec:
    axis = {"grid": False, "labelLimit": 200}
    return {"type": "nominal", "sort": None, "title": title or None, "scale": {"domain": names}, "axis": axis}


def _middle(figure: HeatMap) -> float:
    """The number above which the colour is too bright for white text."""
    known = [value for line in figure.values for value in line if value is not None]
    low, high = figure.limits or (min(known, default=0.0), max(known, default=1.0))
    return math.exp(0.4 * math.log(low) + 0.6 * math.log(high)) if figure.scale == "log" else 0.4 * low + 0.6 * high
