"""The interactive figures of a probe: a row for each tensor, in the order of the forward pass."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]

from roundoff.errors import printable
from roundoff.report import curves, traces
from roundoff.report import probe_view as view
from roundoff.report.curves import Floats
from roundoff.report.elements import Chart
from roundoff.report.probe_view import Result

ROW = 26  # pixels
SPREAD = 0.7  # of a row, over which the modes stand one below the other


def charts(result: Result, prefix: str = "", places: Mapping[str, int] | None = None) -> list[Chart]:
    """All figures.

    Args:
        result: of the probe.
        prefix: of the ids, where a page shows several probes.
        places: mode -> its index in the page, which gives it its colour; by default in the order of the probe.
    """
    known = {name: i for i, name in enumerate(view.modes(result))} if places is None else places
    return [
        _errors(
            result,
            f"{prefix}error",
            known,
            "error_to_noise",
            "Error to noise",
            "Root mean square of the error of the unscaled gradient against float64, over the standard deviation of "
            "the float64 gradient from batch to batch; 0.001 adds a millionth to the variance that sampling has. "
            "Bars: twice the standard error, from the number of batches.",
        ),
        _errors(
            result,
            f"{prefix}bias",
            known,
            "bias",
            "Bias",
            "Length of the mean error, over the length of the mean gradient: what does not average out. "
            "Bars: its square plus and minus twice the square's standard error; where one reaches down to the axis, "
            "the bias may be 0. A bias that was found to be 0 has no mark.",
        ),
        _heat(result, f"{prefix}heat"),
    ]


def _figure(names: list[str], x: dict[str, Any], height: int, below: int = 56) -> Any:
    """An empty figure with a row for each of `names`, which are Plotly's text, downwards from 0; sizes in pixels."""
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": traces.FONT, "size": 13, "color": "#1a1a1a"},
            "margin": {"l": 8, "r": 12, "t": 28, "b": below},
            "height": height,
            "xaxis": {**traces.AXIS, "automargin": True, **x},
            "yaxis": {**traces.AXIS, "ticks": "", "showgrid": False, "automargin": True}
            | {"range": [len(names) - 0.5, -0.5], "tickvals": list(range(len(names))), "ticktext": names}
            | {"tickfont": {"size": 11}},
            "showlegend": False,
            "hovermode": "closest",
            "hoverlabel": {"namelength": -1, "font": {"size": 12}},
        }
    )


def _labels(result: Result) -> list[str]:
    return [traces.shown(view.short(printable(name))) for name in view.tensors(result)]


def _errors(result: Result, name: str, places: Mapping[str, int], figure: str, title: str, caption: str) -> Chart:
    """`figure` and its error, of each mode in each tensor and over all parameters."""
    tensors = [None, *view.tensors(result)]
    values = {mode: view.column(result, mode, figure) for mode in view.modes(result)}
    positive = np.array([values[mode] for mode in values]) > 0
    if not positive.any():
        return Chart(name, title, f"No mode has a known {title.lower()} above 0.", None, over_steps=False)
    rows = [i for i in range(len(tensors)) if i == 0 or positive[:, i].any()]
    labels = [f"<b>{view.TOTAL}</b>", *_labels(result)]
    seen = np.concatenate([value[value > 0] for value in values.values()])
    low, high = float(np.floor(np.log10(seen.min()))), float(np.ceil(np.log10(seen.max())))
    drawn = _figure(
        [labels[i] for i in rows],
        {"title": title.lower(), "type": "log", "exponentformat": "power", "dtick": max(1, (high - low) // 8)}
        | {"range": [low - 0.1, max(high, low + 1) + 0.1]},
        len(rows) * max(ROW, 5 * len(values)) + 84,
    )
    for place in range(0, len(rows), 2):  # or the eye loses its row
        drawn.add_hrect(place - 0.5, place + 0.5, fillcolor="#f6f6f4", line_width=0, layer="below")
    if figure == "error_to_noise":
        drawn.add_vline(1.0, line={"color": "#888", "width": 1, "dash": "dot"})
    texts = [traces.shown(view.TOTAL if tensor is None else tensor, 80) for tensor in tensors]
    for turn, mode in enumerate(values):
        at = np.arange(len(rows), dtype=np.float64) + SPREAD * ((turn + 0.5) / len(values) - 0.5)
        errors = view.column(result, mode, f"{figure}_error")
        bars = _bars(figure, values[mode][rows], errors[rows])
        _add_marks(drawn, mode, places[mode], values[mode][rows], errors[rows], bars, at, [texts[i] for i in rows])
    return Chart(name, title, caption, drawn, over_steps=False)


def _bars(figure: str, x: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Lengths down and up: twice the standard error, which for a bias is its square's (see `statistics.bias`)."""
    if figure != "bias":
        return 2 * errors, 2 * errors
    two = 2 * ((x + errors) ** 2 - x**2)
    return x - np.sqrt(np.maximum(x**2 - two, 0.0)), np.sqrt(x**2 + two) - x


def _add_marks(
    drawn: Any,
    mode: str,
    index: int,
    x: Floats,
    errors: Floats,
    bars: tuple[Floats, Floats],
    y: Floats,
    texts: list[str],
) -> None:
    style = curves.style(index)
    there = x > 0
    down, up = (np.nan_to_num(bar[there]) for bar in bars)
    x, errors = x[there], np.nan_to_num(errors[there])
    drawn.add_scatter(
        x=x,
        y=y[there],
        # A bar must end above 0, or a logarithmic axis has no place for it.
        error_x={"type": "data", "array": up, "arrayminus": np.minimum(down, x * (1 - 1e-6))}
        | {"symmetric": False, "color": style.colour, "thickness": 1.2, "width": 0},
        customdata=errors,
        text=[text for text, kept in zip(texts, there, strict=True) if kept],
        name=traces.shown(mode),
        meta=index,
        mode="markers",
        marker={"symbol": traces.MARKERS[style.marker], "size": 8, "color": style.colour},
        hovertemplate="%{text}: %{x:.3g} +- %{customdata:.1g}",
    )


def _heat(result: Result, name: str) -> Chart:
    """The shares that each static scale would flush or let overflow, with the safe window drawn in."""
    title = "Every loss scale"
    ks, labels, scaling = result["scales"]["k"], _labels(result), view.scaling(result)
    drawn = _figure(
        labels,
        {"title": "loss scale", "range": [ks[0] - 0.5, ks[-1] + 0.5], "showgrid": False}
        | {
            "tickvals": ks[:: max(1, len(ks) // 8)],
            "ticktext": [f"2<sup>{k}</sup>" for k in ks[:: max(1, len(ks) // 8)]],
        },
        len(labels) * ROW + 138,
        110,
    )
    shares = [view.predicted(result, what) for what in ("flushed", "subnormal", "overflowed")]
    texts = [traces.shown(tensor, 80) for tensor in view.tensors(result)]
    drawn.add_heatmap(
        x=ks,
        y=list(range(len(labels))),
        z=view.heat(result),
        customdata=np.stack(shares, axis=-1),
        text=[[text] * len(ks) for text in texts],
        zmin=-1,
        zmax=1,
        colorscale=view.COLOURS,
        xgap=1,
        ygap=1,
        hovertemplate="%{text} at 2<sup>%{x}</sup>: flushed %{customdata[0]:.3~%}, subnormal %{customdata[1]:.3~%}, "
        "overflowed %{customdata[2]:.3~%}<extra></extra>",
        colorbar={"orientation": "h", "thickness": 10, "len": 0.8, "y": 0, "yref": "container", "yanchor": "bottom"}
        | {"tickvals": list(view.SHADES), "ticktext": list(view.SHADES.values()), "tickfont": {"size": 11}},
    )
    caption = (
        "Predicted from the float64 gradients, for fp16 and every static loss scale: blue, the share of each tensor "
        "that becomes 0; orange, the share that overflows, of which any costs the step. "
    )
    window = result["window"]
    if window is None:
        caption += "No scale that was looked at serves every tensor."
    else:
        edges = window["low"] - 0.5, window["high"] + 0.5
        drawn.add_vrect(*edges, line={"color": "#000000", "width": 2})
        caption += f"Frame: the safe window, from 2**{window['low']} to 2**{window['high']}."
    if result["scale"] is not None:
        drawn.add_vline(result["scale"], line={"color": "#000000", "width": 1.5, "dash": "dot"})
        caption += f" Dotted: the scale to take, 2**{result['scale']}."
    if scaling:
        drawn.add_scatter(
            x=list(scaling),
            y=[-0.5] * len(scaling),
            text=[traces.shown(", ".join(modes), 200) for modes in scaling.values()],
            mode="markers",
            marker={"symbol": "triangle-down", "size": 11, "color": "#000000"},
            cliponaxis=False,
            hovertemplate="scale of %{text}<extra></extra>",
        )
        caption += " Triangles above: the scales of " + "; ".join(
            f"{', '.join(printable(mode, 60) for mode in modes)} (2**{k:g})" for k, modes in sorted(scaling.items())
        )
        caption += "."
    return Chart(name, title, caption, drawn, over_steps=False)
