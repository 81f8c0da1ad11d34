"""probe.png: error to noise of each tensor beside its share lost at every loss scale, as one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from roundoff.report import curves
from roundoff.report import probe_view as view
from roundoff.report.png import DPI, MARKERS, WIDTH, add_legend, shown
from roundoff.report.probe_figures import SPREAD
from roundoff.report.probe_view import Result
from roundoff.runs.files import write_atomically

ROW = 0.24  # inches


def write_png(path: Path, result: Result) -> None:
    """Write the picture of `result`, which is what `roundoff.gradients.result.read_probe` returns.

    Raises:
        OSError: `path` cannot be written.
    """
    figure = _draw(result)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw(result: Result) -> Figure:
    names = view.tensors(result)
    figure = Figure(figsize=(WIDTH, 2.4 + ROW * (len(names) + 1)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[4, 5])
    modes = view.modes(result)
    if modes:
        handles = [Line2D([], [], linestyle="", markersize=7, **_marker(place)) for place in range(len(modes))]
        add_legend(figure, handles, [shown(mode) for mode in modes])
    _errors(left, result)
    _heat(figure, right, result)
    left.set_ylim(len(names) - 0.5, -1.5)
    left.set_yticks(range(-1, len(names)), [view.TOTAL, *(shown(view.short(name)) for name in names)], fontsize=9)
    left.get_yticklabels()[0].set_fontweight("bold")
    for axis in (left, right):
        axis.tick_params(axis="x", labelsize=10)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _marker(place: int) -> dict[str, Any]:
    style = curves.style(place)
    return {"color": style.colour, "marker": MARKERS[style.marker]}


def _errors(axis: Any, result: Result) -> None:
    axis.set_title("Error to noise", fontsize=11, loc="left")
    axis.set_xlabel("error / spread over batches", fontsize=10)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    for place in range(-1, len(view.tensors(result)), 2):  # or the eye loses its row
        axis.axhspan(place - 0.5, place + 0.5, color="#f6f6f4", linewidth=0, zorder=0)
    modes = view.modes(result)
    for turn, mode in enumerate(modes):
        x, error = view.column(result, mode, "error_to_noise"), view.column(result, mode, "error_to_noise_error")
        there = x > 0
        at = np.arange(len(x))[there] - 1 + SPREAD * ((turn + 0.5) / len(modes) - 0.5)
        x, error = x[there], 2 * np.nan_to_num(error[there])
        bars = np.stack([np.minimum(error, x * (1 - 1e-6)), error])  # which a logarithmic axis needs above 0
        axis.errorbar(x, at, xerr=bars, linestyle="", markersize=4.5, elinewidth=0.9, **_marker(turn))
    if axis.lines:
        axis.set_xscale("log")


def _heat(figure: Figure, axis: Any, result: Result) -> None:
    ks, heat = result["scales"]["k"], view.heat(result)
    edges = np.arange(ks[0], ks[-1] + 2) - 0.5
    colours = LinearSegmentedColormap.from_list("probe", view.COLOURS)
    mesh = axis.pcolormesh(
        edges, np.arange(len(heat) + 1) - 0.5, heat, cmap=colours, vmin=-1, vmax=1, edgecolors="#ffffff", linewidth=0.5
    )
    bar = figure.colorbar(mesh, ax=axis, orientation="horizontal", aspect=40, pad=0.02)
    bar.set_ticks(list(view.SHADES), labels=list(view.SHADES.values()), fontsize=8)
    title, below = "Lost in fp16 (predicted)", ["loss scale"]
    window = result["window"]
    if window is not None:
        span = window["low"] - 0.5, window["high"] + 0.5
        axis.axvspan(*span, fill=False, edgecolor="#000000", linewidth=1.8)
        title += "; frame: safe"
    if result["scale"] is not None:
        axis.axvline(result["scale"], color="#000000", linewidth=1.2, linestyle=":")
        below.append("dots: to take")
    for k in view.scaling(result):
        axis.plot([k], [-0.75], "v", color="#000000", markersize=7, clip_on=False)
    below += ["triangles: of the modes"] if view.scaling(result) else []
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel("; ".join(below), fontsize=10)
    ticks = ks[:: max(1, len(ks) // 8)]
    axis.set_xticks(ticks, [f"$2^{{{k}}}$" for k in ticks])
    axis.set_xlim(edges[0], edges[-1])
