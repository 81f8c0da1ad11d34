"""Paint a `Panel` as a figure of Plotly: plain data that plotly.js draws in a page."""

import re
from functools import singledispatch
from html import escape
from typing import Any

import numpy as np

from roundoff.errors import printable
from roundoff.report.panels import Axis, Band, Curve, HeatMap, Item, Line, Marks, Panel, Stretch, Style, Tick, style

Json = dict[str, Any]

MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
FEW = 60
"""A curve of at most as many points shows them."""

THIN = 0.45
"""Opacity of the runs that are not a mode's first."""

_AXIS: Json = {
    "gridcolor": "#e6e6e6",
    "zeroline": False,
    "linecolor": "#666",
    "ticks": "outside",
    "tickfont": {"size": 12},
}
_FIELD = re.compile(r"\{(\w+)(\[\d\])?(?::([^}]*)([^}]))?\}")


def paint(panel: Panel) -> Json:
    """Return data and layout of the figure. A trace's `meta` is the index of its mode, if it belongs to one."""
    data, shapes = list[Json](), list[Json]()
    for item in panel.items:
        if isinstance(item, Line | Stretch):
            shapes.append(_shape(item) | {"layer": "above" if data else "below"})
        else:
            data += _traces(item)
    return {"data": data, "layout": _layout(panel) | {"shapes": shapes}}


def height(panel: Panel) -> int | None:
    """Return the height of a panel of rows in pixels; None for a panel whose height the page gives."""
    if not panel.rows:
        return None
    marked = [row for item in panel.items if isinstance(item, Marks) and item.mode is not None for row in _rows(item)]
    beside = max(map(marked.count, set(marked)), default=0)
    margin = _margin(panel)
    return panel.rows * max(26, 5 * beside) + margin["t"] + margin["b"]


def _rows(item: Marks) -> set[int]:
    """Return the rows in which `item` has marks, which stand less than half a row away from them."""
    return {round(float(y)) for y in item.y}


def shown(name: str, limit: int = 60) -> str:
    """Return `name` for Plotly, which reads tags in the text that it shows, and turns entities back into characters."""
    return escape(printable(name, limit), quote=False)


def _has_heat(panel: Panel) -> bool:
    return any(isinstance(item, HeatMap) for item in panel.items)


def _margin(panel: Panel) -> dict[str, int]:
    if not panel.rows:
        return {"l": 74, "r": 12, "t": 12, "b": 48}
    return {"l": 8, "r": 12, "t": 28, "b": 110 if _has_heat(panel) else 56}


def _layout(panel: Panel) -> Json:
    x, y = _axis(panel.x), _axis(panel.y)
    if panel.rows:
        x |= {"automargin": True, "showgrid": not _has_heat(panel)}
        y |= {"automargin": True, "showgrid": False, "ticks": "", "tickfont": {"size": 11}}
    return {
        "template": "none",
        "font": {"family": FONT, "size": 13, "color": "#1a1a1a"},
        "margin": _margin(panel),
        "height": height(panel),
        "xaxis": x,
        "yaxis": y,
        "showlegend": False,
        "hovermode": "x unified" if panel.over_steps else "closest",
        "hoverlabel": {"namelength": -1, "font": {"size": 12}},
    }


def _axis(axis: Axis) -> Json:
    found = _AXIS | {"title": shown(axis.label, 100)}
    span = axis.span
    if axis.log:
        found |= {"type": "log", "exponentformat": "power"}
        span = span and (float(np.log10(span[0])), float(np.log10(span[1])))
    found["range"] = span
    if axis.ticks:
        found |= {"tickvals": [tick.at for tick in axis.ticks], "ticktext": [_tick(tick) for tick in axis.ticks]}
    elif span and axis.whole and span[1] - span[0] <= 20:
        found["dtick"] = 1
    elif span and axis.log and span[1] - span[0] > 1.5:  # powers of ten alone, if there are some
        found["dtick"] = max(1, int(span[1] - span[0]) // 8)
    return found


def _tick(tick: Tick) -> str:
    text = shown(tick.text) + (f"<sup>{shown(tick.exponent)}</sup>" if tick.exponent else "")
    return f"<b>{text}</b>" if tick.bold else text


def _shape(item: Line | Stretch) -> Json:
    if isinstance(item, Line):
        ends: Json = {"type": "line", f"{item.side}0": item.at, f"{item.side}1": item.at}
        ends["line"] = {"color": item.colour, "width": item.width, "dash": "dot" if item.dotted else "solid"}
    else:
        ends = {"type": "rect", f"{item.side}0": item.low, f"{item.side}1": item.high, "fillcolor": item.fill}
        ends["line"] = {"color": "#000000", "width": 0 if item.fill else 2}
    across = "y" if item.side == "x" else "x"
    return ends | {f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}


@singledispatch
def _traces(item: Item) -> list[Json]:
    raise TypeError(type(item))


@_traces.register
def _(item: Curve) -> list[Json]:
    look = style(item.mode)
    marked = len(item.x) == 1 or item.markers == "all" or (item.markers == "few" and len(item.x) <= FEW)
    width, size, opacity = {"strong": (2, 7, 1.0), "thin": (1, 5, THIN), "pale": (1, 5, 0.1)}[item.weight]
    line = {"color": look.colour, "width": width, "shape": "hv" if item.steps else "linear"}
    return [
        {
            "type": "scatter",
            "x": _compact(item.x),
            "y": _compact(item.y),
            "customdata": item.exact,
            "name": shown(item.name),
            "meta": item.mode,
            "mode": "lines+markers" if marked and item.weight != "pale" else "lines",
            "line": line | ({} if item.weight == "pale" else {"dash": _dash(look)}),
            "marker": {"symbol": MARKERS[look.marker], "size": size},
            "opacity": opacity,
            **_hover(item.hover),
        }
    ]


@_traces.register
def _(item: Band) -> list[Json]:
    return [
        {
            "type": "scatter",
            "x": _compact(item.x),
            "y": _compact(edge),
            "meta": item.mode,
            "mode": "lines",
            "line": {"width": 0},
            "fill": fill,
            "fillcolor": "rgba(0,0,0,0.13)",
            "hoverinfo": "skip",
        }
        for edge, fill in ((item.low, None), (item.high, "tonexty"))
    ]


@_traces.register
def _(item: Marks) -> list[Json]:
    look = Style("#000000", (), 0) if item.mode is None else style(item.mode)
    marker: Json = {
        "mode": {"symbol": MARKERS[look.marker], "size": 8},
        "cross": {"symbol": "x", "size": 8, "line": {"color": "#ffffff", "width": 1}},
        "triangle": {"symbol": "triangle-down", "size": 11},
    }[item.shape]
    trace = {
        "type": "scatter",
        "x": item.x,
        "y": item.y,
        "customdata": item.exact,
        "text": [shown(text, 200) for text in item.texts] or None,
        "name": shown(item.name),
        "meta": item.mode,
        "mode": "markers",
        "marker": marker | {"color": look.colour},
        "opacity": 1.0 if item.strong else THIN,
        **_hover(item.hover, nameless=item.mode is None),
    }
    if item.shape == "triangle":  # it stands on the edge
        trace["cliponaxis"] = False
    if item.bars is not None:
        down, up = item.bars
        trace["error_x"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        trace["error_x"] |= {"color": look.colour, "thickness": 1.2, "width": 0}
    return [trace]


@_traces.register
def _(item: HeatMap) -> list[Json]:
    bar = {"orientation": "h", "thickness": 10, "len": 0.8, "y": 0, "yref": "container", "yanchor": "bottom"}
    return [
        {
            "type": "heatmap",
            "x": item.x,
            "y": list(range(len(item.z))),
            "z": item.z,
            "customdata": item.exact,
            "text": [[shown(text, 200)] * len(item.x) for text in item.texts],
            "zmin": -1,
            "zmax": 1,
            "colorscale": item.colours,
            "xgap": 1,
            "ygap": 1,
            **_hover(item.hover, nameless=True),
            "colorbar": bar
            | {"tickvals": list(item.shades), "ticktext": list(item.shades.values()), "tickfont": {"size": 11}},
        }
    ]


def _hover(template: str, nameless: bool = False) -> Json:
    """Return `template`, a format string of Python, as Plotly's: "{exact:.9g}" becomes "%{customdata:.9~g}".

    No name goes into a template, since its braces would be read as fields. Plotly adds the name unless `nameless`.
    """
    if not template:
        return {"hoverinfo": "skip"}

    def field(found: re.Match[str]) -> str:
        name, index, digits, kind = found.groups(default="")
        spec = f":{digits}~{kind}" if kind else ""  # ~ leaves zeros at the end away, as "g" does in Python
        return f"%{{{'customdata' if name == 'exact' else name}{index}{spec}}}"

    found = re.sub(r"\^(\S+\})", r"<sup>\1</sup>", _FIELD.sub(field, template))
    return {"hovertemplate": found + ("<extra></extra>" if nameless else "")}


def _compact(values: Any) -> Any:
    """Return the values with half the bytes, where a pixel shows no difference."""
    if values.dtype == np.int64:
        return values.astype(np.int32) if values.max(initial=0) < 2**31 else values.astype(np.float64)
    return np.clip(values, -1e37, 1e37).astype(np.float32)


def _dash(look: Style) -> str:
    return ",".join(f"{length}px" for length in look.dash) or "solid"
