"""curves.png: the main figures as one picture, for papers and pull requests."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from roundoff.errors import printable
from roundoff.report import curves
from roundoff.report.curves import Floats, Mode, Steps
from roundoff.runs.files import write_atomically
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison

DPI = 160
WIDTH = 10.0
"""Inches; the picture has 1600 pixels, and its 11 point letters can still be read at 800."""

MARKERS = "osD^vP*h"


def write_png(path: Path, comparison: Comparison) -> None:
    """Write the picture.

    Raises:
        OSError: `path` cannot be written.
    """
    figure = _draw(comparison)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw(comparison: Comparison) -> Figure:
    drawn = curves.modes(comparison)
    if not drawn:
        figure = Figure(figsize=(WIDTH, 2), dpi=DPI)
        figure.text(0.5, 0.5, "No run has a step that could be drawn.", ha="center", va="center", fontsize=14)
        return figure
    reference = next((mode for mode in drawn if mode.label == comparison.reference), None)
    window = curves.window(drawn)
    has_epochs = any(run.epochs for mode in drawn for run in mode.runs)
    changing = any(len(set(run.steps["loss_scale"])) > 1 for mode in drawn for run in mode.runs)
    has_difference = reference is not None and len(drawn) > 1
    rows = [["loss", "loss"]]
    rows += [["difference", "difference"]] if has_difference else []
    last = (["validation"] if has_epochs else []) + (["scale"] if changing else [])
    rows += [last * 2 if len(last) == 1 else last] if last else []
    figure = Figure(figsize=(WIDTH, 1.2 + 2.8 * len(rows)), dpi=DPI, layout="constrained")
    axes: dict[str, Any] = figure.subplot_mosaic(rows)  # type: ignore[arg-type]
    _legend(figure, drawn, reference)
    _loss(axes["loss"], drawn, reference, window)
    if reference is not None and has_difference:
        _difference(axes["difference"], drawn, reference, window)
    if has_epochs:
        _validation(axes["validation"], drawn)
    if changing:
        _loss_scale(axes["scale"], drawn)
    for axis in axes.values():
        axis.grid(color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _legend(figure: Figure, drawn: list[Mode], reference: Mode | None) -> None:
    labels = [f"{shown(mode.label)}{' (reference)' if mode is reference else ''}" for mode in drawn]
    add_legend(figure, [Line2D([], [], linewidth=2.2, **_line(mode)) for mode in drawn], labels)


def add_legend(figure: Figure, handles: list[Line2D], labels: list[str]) -> None:
    """Add a legend above, in as many columns as the picture has room for, at most 4."""
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=columns,
            fontsize=11,
            frameon=False,
            handlelength=3.6,
        )
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            break
        legend.remove()


def shown(name: str) -> str:
    """`name` for matplotlib, which reads $ as mathematics, and whose own font lacks most letters beyond Europe's."""
    latin = printable(name, 40).encode("latin-1", "backslashreplace").decode("latin-1")
    return latin.replace(r"\u2026", "…").replace("$", r"\$")


def _line(mode: Mode) -> dict[str, Any]:
    dash = mode.style.dash
    scaled = tuple(length * 0.45 for length in dash)  # matplotlib counts in line widths
    return {"color": mode.style.colour, "linestyle": (0, scaled) if dash else "solid"}


def _plot(axis: Any, mode: Mode, x: Steps | Floats, y: Floats, first: bool, **more: Any) -> None:
    kept = curves.spread_out(len(x))
    lone = {"marker": MARKERS[mode.style.marker], "markersize": 5} if len(kept) <= 30 else {}
    width, alpha = (1.8, 1.0) if first else (0.9, 0.45)
    finite = np.where(np.isfinite(y), y, np.nan)[kept]
    axis.plot(x[kept], finite, linewidth=width, alpha=alpha, **_line(mode), **lone, **more)


def _over_steps(axis: Any, title: str, y: str, drawn: list[Mode]) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel("step (position in the data)", fontsize=10)
    axis.set_ylabel(y, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    last = max(int(curves.steps(run)[-1]) for mode in drawn for run in mode.runs)
    axis.set_xlim(1 - max(0.5, last * 0.01), last + max(0.5, last * 0.01))


def _band(axis: Any, band: curves.Band) -> None:
    kept = curves.spread_out(len(band[0]))
    axis.fill_between(*(edge[kept] for edge in band), color="#000000", alpha=0.13, linewidth=0)


def _loss(axis: Any, drawn: list[Mode], reference: Mode | None, window: int) -> None:
    band = reference and curves.band(reference, window)
    title = f"Training loss, mean of {window} steps" if window > 1 else "Training loss"
    title += "; thin: other seeds than the first" if any(len(mode.runs) > 1 for mode in drawn) else ""
    if reference and band:
        _band(axis, band)
        title += f"; grey: all {len(reference.runs)} seeds of the reference"
    _over_steps(axis, title, "nats a word", drawn)
    shown: list[tuple[Run, Floats]] = []
    for mode, run, first in curves.layers(drawn):
        smoothed = curves.smooth(curves.column(run, "loss"), window)
        shown.append((run, smoothed))
        _plot(axis, mode, curves.steps(run), smoothed, first)
    axis.set_ylim(curves.limits(shown))


def _difference(axis: Any, drawn: list[Mode], reference: Mode, window: int) -> None:
    band = curves.noise(reference, window)
    title = "Training loss minus the reference's at the same batch and seed"
    title += f", mean of {window} steps" if window > 1 else ""
    title += "; grey: its seeds around their mean" if band else ""
    _over_steps(axis, title, "nats", drawn)
    if band:
        _band(axis, band)
    axis.axhline(0.0, color=reference.style.colour, linewidth=1.2)
    shown: list[tuple[Run, Floats]] = []
    for mode, run, first in curves.layers(drawn):
        found = None if mode is reference else curves.difference(run, reference)
        if found:
            smoothed = curves.smooth(found[1], window)
            shown.append((run, smoothed))
            _plot(axis, mode, found[0], smoothed, first)
    limit = curves.reach(shown, band)
    axis.set_ylim(-limit, limit)


def _validation(axis: Any, drawn: list[Mode]) -> None:
    axis.set_title("Validation perplexity", fontsize=11, loc="left")
    axis.set_xlabel("epoch", fontsize=10)
    shown: list[tuple[Run, Floats]] = []
    for mode, run, first in curves.layers(drawn):
        if run.epochs:
            x, perplexity = curves.epochs(run, drawn)
            shown.append((run, perplexity))
            _plot(axis, mode, x, perplexity, first)
    axis.set_ylim(curves.limits(shown))
    axis.set_xlim(0.6, curves.last_epoch(drawn) + 0.4)  # or one epoch alone would get ticks of hundredths
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _loss_scale(axis: Any, drawn: list[Mode]) -> None:
    _over_steps(axis, "Loss scale; crosses: skipped steps", "", drawn)
    axis.set_yscale("log", base=2)
    axis.margins(y=0.1)
    for mode, run, first in curves.layers(drawn):
        at, scales, skipped = curves.loss_scale(run)
        width, alpha = (1.8, 1.0) if first else (0.9, 0.45)
        axis.plot(at, scales, drawstyle="steps-post", linewidth=width, alpha=alpha, **_line(mode))
        crosses = {"color": mode.style.colour, "markersize": 6, "markeredgewidth": 1.6, "alpha": alpha}
        axis.plot(at[skipped], scales[skipped], "x", **crosses)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda scale, _: f"$2^{{{np.log2(scale):.0f}}}$"))
