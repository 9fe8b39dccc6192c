"""The Vega-Lite layers of a figure: bands, lines, bars, points, rules, and what is shown under the pointer."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gradmaker.reporting.figure import Axis, Figure, Series, Value
from gradmaker.reporting.look import BAND, Look, Spec, written
from gradmaker.reporting.palette import pattern

HEIGHT = 300
HIDDEN = "hidden"  # the signal with the names of rows that are switched off
SHOWN = {"filter": f"indexof({HIDDEN}, datum.row) < 0"}
MANTISSA = "toNumber(format(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)), '.3~r'))"


def layers(figure: Figure, slots: Mapping[str, int], look: Look) -> Spec:
    """The parts of the specification that are about series."""
    names = _details(figure)
    values = [{**point, "n": n} for n, series in enumerate(figure.series) for point in _points(series, names)]
    layers = [layer for marks in _MARKS for layer in marks(figure, look)]
    return {
        "height": figure.height or (BAND * len(_names(figure)) if figure.lying else HEIGHT),
        "data": {"values": values},
        **({} if look.complete else {"params": [{"name": HIDDEN, "value": []}], "transform": [SHOWN, *_texts(figure)]}),
        "encoding": {"x": _axis("x", figure), "y": _axis("y", figure), **_row_scales(figure, slots, look)},
        "layer": [*layers, *_pointer(figure, names, look), *_rules(figure, look)],
    }


def _details(figure: Figure) -> list[str]:
    return list(dict.fromkeys(name for series in figure.series for name in series.details))


def _names(figure: Figure) -> set[Any]:
    return {name for series in figure.series for name in series.y}


def _points(series: Series, names: list[str]) -> Iterable[Spec]:
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        point: Spec = {"row": series.row, "mark": series.mark, "x": _short(x), "y": _short(y)}
        if series.low is not None and series.high is not None:
            point |= {"low": _short(series.low[i]), "high": _short(series.high[i])}
        yield point | {f"d{k}": series.details[name][i] for k, name in enumerate(names) if name in series.details}


def _short(value: Value) -> Value:
    """No more digits than are drawn or shown."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _row_scales(figure: Figure, slots: Mapping[str, int], look: Look) -> Spec:
    """Colour and dashes by row."""
    rows = figure.rows
    symbol = {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolSize": 300} if figure.lines else {"symbolType": "circle"}
    legend = {"title": None, "orient": "bottom", "columns": 4, "symbolOpacity": 1, **symbol} if look.complete and rows else None
    made: Spec = {"color": _by_row(rows, [look.row(slots[row]) for row in rows], legend)}
    if figure.lines:
        made["strokeDash"] = _by_row(rows, [pattern(slots[row]) or [1, 0] for row in rows], legend)
    return made


def _by_row(rows: list[str], range_: list[Any], legend: Spec | None) -> Spec:
    return {"field": "row", "type": "nominal", "scale": {"domain": rows, "range": range_}, "legend": legend}


def _lines(figure: Figure, look: Look) -> Iterable[Spec]:
    for mark, interpolate in (("line", "linear"), ("step", "step-after")):
        own = [series for series in figure.series if series.mark == mark]
        drawn: Spec = {"type": "line", "interpolate": interpolate, "clip": True}
        if any(series.low is not None for series in own):
            area = {"type": "area", "interpolate": interpolate, "opacity": 0.16, "clip": True}
            band = {"y": _end(figure.y, "low"), "y2": {"field": "high"}, "strokeDash": None}
            yield {"transform": [_only(mark, "datum.low != null")], "mark": area, "encoding": band}
        if any(not series.row for series in own):
            grey = {"color": {"value": look.soft}, "strokeDash": {"value": [4, 3]}}
            yield {"transform": [_only(mark, "datum.row === ''")], "mark": {**drawn, "strokeWidth": 1.3}, "encoding": grey}
        if any(series.row for series in own):
            yield {"transform": [_only(mark, "datum.row !== ''")], "mark": drawn}


def _single_points(figure: Figure, look: Look) -> Iterable[Spec]:
    own = [series for series in figure.series if series.mark == "points"]
    side, axis = ("x", figure.x) if figure.lying else ("y", figure.y)
    if any(series.low is not None for series in own):
        ends = {side: _end(axis, "low"), f"{side}2": {"field": "high"}}
        bar = {"type": "rule", "strokeWidth": 1.5}
        yield {"transform": [_only("points", "datum.low != null")], "mark": bar, "encoding": {**ends, "strokeDash": None}}
    if own:
        dot = {"type": "point", "filled": True, "size": 80, "opacity": 1, "clip": True}
        yield {"transform": [_only("points")], "mark": dot}


def _bars(figure: Figure, look: Look) -> Iterable[Spec]:
    if any(series.mark == "bars" for series in figure.series):
        order = {"field": "n", "type": "quantitative"}
        told = {} if look.complete else {"tooltip": _tooltip(figure, _details(figure))}
        yield {"transform": [_only("bars")], "mark": {"type": "bar"}, "encoding": {"order": order, **told}}


_MARKS = (_lines, _bars, _single_points)


def _pointer(figure: Figure, names: list[str], look: Look) -> Iterable[Spec]:
    """A mark at the point nearest to the pointer, whose values are shown."""
    if look.complete or all(series.mark == "bars" or not series.row for series in figure.series):
        return
    near: Spec = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    seen = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    yield {
        "transform": [{"filter": "datum.row !== '' && datum.mark !== 'bars' && datum.x != null && datum.y != null"}],
        "params": [{"name": "near", "select": near}],
        "mark": {"type": "point", "filled": True, "size": 60, "clip": True},
        "encoding": {"opacity": seen, "strokeDash": {"value": []}, "tooltip": _tooltip(figure, names)},
    }


def _tooltip(figure: Figure, names: list[str]) -> list[Spec]:
    axes = [_told(channel, axis) for channel, axis in (("x", figure.x), ("y", figure.y))]
    ends: list[Spec] = []
    if any(series.low is not None for series in figure.series):
        number = figure.x if figure.lying else figure.y
        ends = [{**_told(key, number), "title": title} for key, title in (("low", "lowest"), ("high", "highest"))]
    details = [{"field": f"d{k}", "title": name, "type": "nominal"} for k, name in enumerate(names)]
    return [{"field": "row", "title": "row"}, *axes, *ends, *details]


def _told(field: str, axis: Axis) -> Spec:
    shown = field if axis.scale == "category" else f"{field}_text"
    return {"field": shown, "title": axis.title or field, "type": "nominal"}


def _texts(figure: Figure) -> Iterable[Spec]:
    """Numbers as they are written under the pointer."""
    axes = {"x": figure.x, "y": figure.y}
    if any(series.low is not None for series in figure.series):
        axes |= dict.fromkeys(("low", "high"), figure.x if figure.lying else figure.y)
    for field, axis in axes.items():
        if axis.scale != "category":
            yield {"calculate": written(f"datum.{field}", axis.format), "as": f"{field}_text"}


def _rules(figure: Figure, look: Look) -> Iterable[Spec]:
    for rule in figure.rules:
        data = {"values": [{rule.axis: rule.value}]}
        across: Spec = {"y" if rule.axis == "x" else "x": None}
        grey, dashed = {"color": {"value": look.soft}}, {"strokeDash": {"value": [5, 4]}}
        at = {"x": {"value": 4}} if rule.axis == "y" else {"y": {"value": 4}}
        text: Spec = {"type": "text", "text": rule.label, "align": "left", "baseline": "bottom", "dx": 3, "dy": -3}
        yield {"data": data, "mark": "rule", "encoding": {**across, **grey, **dashed}}
        yield {"data": data, "mark": text, "encoding": {**at, **grey, "strokeDash": None}}


def _only(mark: str, condition: str = "true") -> Spec:
    return {"filter": f"datum.mark === '{mark}' && {condition}"}


def _axis(field: Literal["x", "y"], figure: Figure) -> Spec:
    axis = figure.x if field == "x" else figure.y
    if axis.scale == "category":
        return {"field": field, "type": "nominal", "sort": None, "title": axis.title or None, "axis": {"labelLimit": 200}}
    label = written("datum.value", axis.format)
    if axis.scale == "log":
        label = f"indexof({_mantissas(field, figure)}, {MANTISSA}) >= 0 ? ({label}) : ''"
    ticks = {"labelExpr": label, "tickCount": 6, "labelSeparation": 6}
    return {"field": field, "type": "quantitative", "title": axis.title, "scale": _scale(axis, figure), "axis": ticks}


def _mantissas(field: Literal["x", "y"], figure: Figure) -> list[float]:
    """Labels of a log axis: powers of ten, with 2 and 5 between over less than three decades, and all over less than one."""
    values = [v for series in figure.series for v in getattr(series, field) if isinstance(v, float | int)]
    low, high = (figure.x if field == "x" else figure.y).limits or (min(values), max(values))
    if high > 1e3 * low:
        return [1]
    return [1, 2, 5] if high > 10 * low else [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]


def _scale(axis: Axis, figure: Figure) -> Spec:
    if axis.limits is not None:
        zero = {} if axis.scale == "log" else {"zero": False}
        return {"type": axis.scale, "domain": list(axis.limits), "nice": False, **zero}
    if axis.scale == "log":  # rounded out to powers of ten, it would be mostly empty
        return {"type": "log", "nice": False, "padding": 10 if any(series.mark == "points" for series in figure.series) else 0}
    return {"type": "linear", "zero": axis.zero, "nice": True}


def _end(axis: Axis, name: str) -> Spec:
    return {"field": name, "type": "quantitative", "title": axis.title}
