"""Paint panels as one picture with matplotlib, for papers and pull requests."""

import re
import textwrap
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from roundoff.errors import printable
from roundoff.extras import needs
from roundoff.report.panels import Axis, Band, Curve, HeatMap, Item, Line, Marks, Panel, Stretch, Tick, style
from roundoff.runs.files import write_atomically

with needs("report"):
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D
    from matplotlib.markers import CARETDOWN
    from matplotlib.ticker import MaxNLocator

DPI = 160
WIDTH = 10.0
"""Inches; the picture has 1600 pixels, and its 11 point letters can still be read at 800."""

TITLE = 0.2
"""Inches of a line of the title."""

MOST_SAID = 8

HEIGHT, ROW = 2.8, 0.24
"""Inches of a panel, and of a row where a panel has rows."""

FEW = 30
"""A curve of at most as many points shows them."""

MARKERS = "osD^vP*h"
THIN = 0.45
"""Opacity of the runs that are not a mode's first."""

Legend = Sequence[tuple[int, str]]
"""Index and label of each mode."""


def write(path: Path, figure: Figure) -> None:
    """Write the picture.

    Raises:
        OSError: `path` cannot be written.
    """
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def blank(sentence: str) -> Figure:
    """Return a picture that holds one sentence."""
    figure = Figure(figsize=(WIDTH, 2), dpi=DPI)
    figure.text(0.5, 0.5, sentence, ha="center", va="center", fontsize=14)
    return figure


def paint(grid: Sequence[Sequence[Panel]], legend: Legend, said: Sequence[str] = (), points: bool = False) -> Figure:
    """Return a picture of the panels of `grid`, row by row, with a title and a legend above.

    Args:
        grid: the panels. Those beside each other share their rows, if they have any.
        legend: the modes.
        said: sentences for the title, of which the first `MOST_SAID` are shown.
        points: the legend shows a mode's marker in place of its line.
    """
    columns = max(len(row) for row in grid)
    ratios = [5 if _heat(panel) else 4 for panel in next(row for row in grid if len(row) == columns)]
    heights = [max((1.2 + ROW * panel.rows if panel.rows else HEIGHT) for panel in row) for row in grid]
    title = _title(said)
    height = 1.2 + TITLE * len(title) + sum(heights)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    below: Figure | SubFigure = figure
    if title:
        parts: Any = figure.subfigures(2, 1, height_ratios=[TITLE * len(title), height - TITLE * len(title)])
        above, below = parts
        above.text(0.01, 0.5, "\n".join(title), va="center", fontsize=11, fontweight="bold")
    # A row with one panel only gives it the whole width.
    places = [[panel.id for panel in row] * (columns // len(row)) for row in grid]
    axes: dict[str, Any] = below.subplot_mosaic(places, width_ratios=ratios)  # type: ignore[arg-type]
    _add_legend(below, legend, points)
    for row in grid:
        first = axes[row[0].id]
        for panel in row:
            axis = axes[panel.id]
            if panel.rows and axis is not first:
                axis.sharey(first)
            _panel(axis, panel, named=not panel.rows or axis is first, width=WIDTH / len(row))
    return figure


def shown(name: str, limit: int = 120) -> str:
    """Return `name` for matplotlib, which reads $ as mathematics and whose font lacks most letters beyond Europe's."""
    latin = printable(name, limit).encode("latin-1", "backslashreplace").decode("latin-1")
    return latin.replace(r"\u2026", "…").replace("$", r"\$")


def _title(said: Sequence[str]) -> list[str]:
    """Return the lines of the title, with raised exponents of 2."""
    more = [f"and {len(said) - MOST_SAID} more"] if len(said) > MOST_SAID else []
    lines = [line for sentence in [*said[:MOST_SAID], *more] for line in textwrap.wrap(shown(sentence, 400), 110)]
    return [re.sub(r"\b2\^(-?\d+)", r"$\\mathbf{2^{\1}}$", line) for line in lines]


def _heat(panel: Panel) -> bool:
    return any(isinstance(item, HeatMap) for item in panel.items)


def _add_legend(figure: "Figure | SubFigure", modes: Legend, points: bool) -> None:
    """Add the legend in as many columns as the picture has room for, at most 4. Its order is that of reading."""
    look: dict[str, Any] = {"linestyle": "", "markersize": 7} if points else {"linewidth": 2.2}
    handles = [Line2D([], [], **(_marker(mode) if points else _line(mode)) | look) for mode, _ in modes]
    labels = [shown(label) for _, label in modes]
    for columns in range(min(4, len(labels)), 0, -1):
        order = [i for first in range(columns) for i in range(first, len(labels), columns)]  # a column after the other
        legend = figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside upper center",
            ncols=columns,
            fontsize=11,
            frameon=False,
            handlelength=1.6 if points else 3.6,
        )
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            break
        legend.remove()


def _line(mode: int) -> dict[str, Any]:
    look = style(mode)
    scaled = tuple(length * 0.45 for length in look.dash)  # matplotlib counts in line widths
    return {"color": look.colour, "linestyle": (0, scaled) if look.dash else "solid"}


def _marker(mode: int) -> dict[str, Any]:
    look = style(mode)
    return {"color": look.colour, "marker": MARKERS[look.marker]}


def _panel(axis: Any, panel: Panel, named: bool, width: float) -> None:
    for name, described in (("x", panel.x), ("y", panel.y)):
        if described.log:
            getattr(axis, f"set_{name}scale")("log")
    for depth, item in enumerate(panel.items):
        _draw(item, axis, 1 + depth / 100)
    axis.set_title(textwrap.fill(shown(panel.headline), int(width * 10)), fontsize=11, loc="left")
    _scale(axis, "x", panel.x)
    if named:
        _scale(axis, "y", panel.y)
    if not _heat(panel):
        axis.grid(axis="x" if panel.rows else "both", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=10)
    if panel.rows:
        axis.tick_params(axis="y", length=0, labelsize=9, labelleft=named)
    axis.spines[["top", "right"]].set_visible(False)


def _scale(axis: Any, name: str, described: Axis) -> None:
    getattr(axis, f"set_{name}label")(shown(described.label), fontsize=10)
    if described.span is not None:
        getattr(axis, f"set_{name}lim")(described.span)
    side = axis.xaxis if name == "x" else axis.yaxis
    if described.ticks:
        side.set_ticks([tick.at for tick in described.ticks], [_tick(tick) for tick in described.ticks])
        side.set_ticks([], minor=True)
        for tick, label in zip(described.ticks, side.get_ticklabels(), strict=True):
            label.set_fontweight("bold" if tick.bold else "normal")
    elif described.whole:
        side.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _tick(tick: Tick) -> str:
    return f"${tick.text}^{{{tick.exponent}}}$" if tick.exponent else shown(tick.text)


@singledispatch
def _draw(item: Item, axis: Any, depth: float) -> None:
    raise TypeError(type(item))


@_draw.register
def _(item: Curve, axis: Any, depth: float) -> None:
    marked = item.markers == "all" or (item.markers == "few" and len(item.x) <= FEW)
    lone = {"marker": MARKERS[style(item.mode).marker], "markersize": 5} if marked else {}
    width, alpha = {"strong": (1.8, 1.0), "thin": (0.9, THIN), "pale": (0.9, 0.1)}[item.weight]
    shape = "steps-post" if item.steps else "default"
    look = _line(item.mode) | lone | {"drawstyle": shape, "linewidth": width, "alpha": alpha}
    axis.plot(item.x, item.y, zorder=depth, **look)


@_draw.register
def _(item: Band, axis: Any, depth: float) -> None:
    axis.fill_between(item.x, item.low, item.high, color="#000000", alpha=0.13, linewidth=0, zorder=depth)


@_draw.register
def _(item: Marks, axis: Any, depth: float) -> None:
    colour = "#000000" if item.mode is None else style(item.mode).colour
    shapes: dict[str, dict[str, Any]] = {
        "mode": {"marker": MARKERS[style(item.mode or 0).marker], "markersize": 4.5},
        "cross": {"marker": "x", "markersize": 6, "markeredgewidth": 1.6},
        "triangle": {"marker": CARETDOWN, "markersize": 8, "clip_on": False},  # stands on its tip
    }
    alpha = 1.0 if item.strong else THIN
    look = shapes[item.shape] | {"color": colour, "linestyle": "", "alpha": alpha, "zorder": depth}
    if item.bars is None:
        axis.plot(item.x, item.y, **look)
    else:
        axis.errorbar(item.x, item.y, xerr=np.stack(item.bars), elinewidth=0.9, **look)


@_draw.register
def _(item: HeatMap, axis: Any, depth: float) -> None:
    mesh = axis.pcolormesh(
        np.arange(item.x[0], item.x[-1] + 2) - 0.5,
        np.arange(len(item.z) + 1) - 0.5,
        item.z,
        cmap=LinearSegmentedColormap.from_list("panel", item.colours),
        vmin=-1,
        vmax=1,
        edgecolors="#ffffff",
        linewidth=0.5,
        zorder=depth,
    )
    bar = axis.figure.colorbar(mesh, ax=axis, orientation="horizontal", aspect=40, pad=0.02)
    bar.set_ticks(list(item.shades), labels=list(item.shades.values()), fontsize=8)


@_draw.register
def _(item: Line, axis: Any, depth: float) -> None:
    draw = axis.axvline if item.side == "x" else axis.axhline
    look = {"color": item.colour, "linewidth": 0.8 * item.width, "linestyle": ":" if item.dotted else "-"}
    draw(item.at, zorder=depth, **look)


@_draw.register
def _(item: Stretch, axis: Any, depth: float) -> None:
    draw = axis.axvspan if item.side == "x" else axis.axhspan
    if item.fill is None:
        draw(item.low, item.high, fill=False, edgecolor="#000000", linewidth=1.8, zorder=depth)
    else:
        draw(item.low, item.high, color=item.fill, linewidth=0, zorder=0)  # below the grid
