"""What the figures of report.html are made of: an empty figure, and lines, points and bands in a mode's style."""

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]

from roundoff.errors import printable
from roundoff.report import curves
from roundoff.report.curves import Band, Floats, Mode, Steps

MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
AXIS: dict[str, Any] = {
    "gridcolor": "#e6e6e6",
    "zeroline": False,
    "linecolor": "#666",
    "ticks": "outside",
    "tickfont": {"size": 12},
}


def empty(drawn: list[Mode], y: str) -> Any:
    """A figure over the steps of `drawn` whose y axis has the title `y`; dotted lines end the epochs."""
    last = max((int(curves.steps(run)[-1]) for mode in drawn for run in mode.runs), default=1)
    pad = max(0.5, last * 0.01)
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": FONT, "size": 13, "color": "#1a1a1a"},
            "margin": {"l": 74, "r": 12, "t": 12, "b": 48},
            "xaxis": {**AXIS, "title": "step (position in the data)", "range": [1 - pad, last + pad]}
            | ({"dtick": 1} if last <= 10 else {}),
            "yaxis": {**AXIS, "title": y},
            "showlegend": False,
            "hovermode": "x unified",
            "hoverlabel": {"namelength": -1, "font": {"size": 12}},
            "shapes": [
                {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
                | {"line": {"color": "#bbbbbb", "width": 1, "dash": "dot"}}
                for x in (curves.epoch_ends(drawn) if drawn else [])
            ],
        }
    )


def shown(name: str, limit: int = 60) -> str:
    """`name` for Plotly, which reads tags in the text that it shows, and turns entities back into characters."""
    return escape(printable(name, limit), quote=False)


def add_line(
    figure: Any,
    mode: Mode,
    x: Floats | Steps,
    y: Floats,
    first: bool,
    hover: str,
    exact: Floats | Steps | None = None,
    markers: bool = True,
    shape: str = "linear",
) -> None:
    """Add the curve of one run; the mode's `first` is strong and answers the pointer.

    Args:
        figure: gets the trace.
        mode, first: of the run.
        x, y: the curve; y may hold inf and nan, which leave gaps.
        hover: Plotly's template of what the pointer shows; no name goes into it, since it would be read as template.
        exact: a value for each point, which is `customdata` there.
        markers: whether a curve of few points shows them.
        shape: of the line between two points.
    """
    kept = curves.spread_out(len(x))
    figure.add_scatter(
        x=_compact(x[kept]),
        y=_compact(np.where(np.isfinite(y), y, np.nan)[kept]),
        customdata=exact[kept] if first and exact is not None else None,
        name=shown(mode.label),
        meta=mode.index,
        mode="lines+markers" if len(kept) == 1 or (markers and len(kept) <= 60) else "lines",
        line={"color": mode.style.colour, "width": 2 if first else 1, "dash": _dash(mode), "shape": shape},
        marker={"symbol": MARKERS[mode.style.marker], "size": 7 if first else 5},
        opacity=1.0 if first else 0.45,
        hovertemplate=hover if first else None,
        hoverinfo=None if first else "skip",
    )


def _compact(values: Floats | Steps) -> Any:
    """With half the bytes, where a pixel shows no difference."""
    if values.dtype == np.int64:
        return values.astype(np.int32) if values.max(initial=0) < 2**31 else values.astype(np.float64)
    return np.clip(values, -1e37, 1e37).astype(np.float32)


def _dash(mode: Mode) -> str:
    return ",".join(f"{length}px" for length in mode.style.dash) or "solid"


def add_raw(figure: Any, mode: Mode, x: Steps, y: Floats) -> None:
    """Add single steps as a pale line, with the extremes of a run that has more of them than are drawn."""
    kept = curves.extremes(y)
    figure.add_scatter(
        x=_compact(x[kept]),
        y=_compact(np.where(np.isfinite(y), y, np.nan)[kept]),
        meta=mode.index,
        mode="lines",
        line={"color": mode.style.colour, "width": 1},
        opacity=0.1,
        hoverinfo="skip",
    )


def add_crosses(figure: Any, mode: Mode, x: Steps, y: Floats, first: bool) -> None:
    """Add a cross at each skipped step."""
    figure.add_scatter(
        x=x,
        y=y,
        name=f"{shown(mode.label)}, skipped",
        meta=mode.index,
        mode="markers",
        marker={"symbol": "x", "size": 8, "color": mode.style.colour, "line": {"color": "#ffffff", "width": 1}},
        opacity=1.0 if first else 0.45,
        hovertemplate="skipped at %{y:g}" if first else None,
        hoverinfo=None if first else "skip",
    )


def add_band(figure: Any, reference: Mode, band: Band) -> None:
    """Add the area between the edges of `band`, which goes and comes with the reference."""
    at, low, high = band
    kept = curves.spread_out(len(at))
    for edge, fill in ((low, None), (high, "tonexty")):
        figure.add_scatter(
            x=at[kept],
            y=_compact(edge[kept]),
            meta=reference.index,
            mode="lines",
            line={"width": 0},
            fill=fill,
            fillcolor="rgba(0,0,0,0.13)",
            hoverinfo="skip",
        )
