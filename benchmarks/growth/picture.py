"""One picture of how cost grows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.growth.axes import GrowthAxis
from benchmarks.measure import REFERENCE, Row
from roundoff.report.matplotlib_painter import paint, write
from roundoff.report.panels import Axis, Curve, Panel, Tick

VARIANTS = (REFERENCE, "fp32", "amp-bf16", "compare", "probe")
"""All that have a curve. The place of each gives its colour."""
LEGEND = ((0, "loop of the PyTorch tutorial"), (1, "main.py, fp32"), (2, "main_amp.py, bf16"))
"""What the panels of training show; those of the others have titles."""
STEPS_OF_TICKS = ((1,), (1, 3), (1, 2, 5))
LEAST_TICKS = 3
MARGIN = 1.2  # of an axis beyond what is drawn, as a factor


def draw(path: Path, axes: Mapping[str, GrowthAxis], rows: list[Row]) -> None:
    """Write the picture of `rows`, of which any may be missing, as PNG."""
    write(path, paint(panels(axes, rows), LEGEND))


def panels(axes: Mapping[str, GrowthAxis], rows: list[Row]) -> list[list[Panel]]:
    """Return the lines of panels: time and memory of training, and the time of all else."""
    trained = {name: axis for name, axis in axes.items() if not axis.title}
    others = {name: axis for name, axis in axes.items() if axis.title}
    return [
        line(trained, rows, "seconds", "seconds a step"),
        line(trained, rows, "mib", "peak memory, MiB"),
        line(others, rows, "seconds", "seconds"),
    ]


def line(axes: Mapping[str, GrowthAxis], rows: list[Row], figure: str, label: str) -> list[Panel]:
    """Return a panel of `figure` ("seconds" or "mib") for each of `axes`. All have one scale, so the first names it."""
    values = [value(row, figure) for row in rows if row["axis"] in axes]
    span = (min(values) / MARGIN, max(values) * MARGIN) if values else None
    found: list[Panel] = []
    for name, axis in axes.items():
        x = Axis(axis.label, (axis.values[0] / MARGIN, axis.values[-1] * MARGIN), log=True, ticks=ticks(axis.values))
        y = Axis("" if found else label, span, log=True, ticks=ticks(span or ()))
        shown = tuple(curves([row for row in rows if row["axis"] == name], figure))
        found.append(Panel(f"{name}-{figure}", name, "", axis.title, x, y, shown))
    return found


def curves(rows: list[Row], figure: str) -> Iterator[Curve]:
    """Yield the curve of each variant in `rows`."""
    for mode, variant in enumerate(VARIANTS):
        points = [(row["at"], value(row, figure)) for row in rows if row["name"] == variant]
        if points:
            x, y = np.array(points, dtype=np.float64).T
            yield Curve(mode, variant, x, y)


def value(row: Row, figure: str) -> Any:
    """Return what is drawn of `row`: the median of its seconds, or its MiB."""
    return row["seconds"]["median"] if figure == "seconds" else row["mib"]


def ticks(values: Sequence[float]) -> tuple[Tick, ...]:
    """Return ticks for a logarithmic axis: `values`, if they are three or four, else round numbers within them."""
    if LEAST_TICKS <= len(values) <= LEAST_TICKS + 1:
        return tuple(Tick(at, short(at)) for at in values)
    found: list[float] = []
    for steps in STEPS_OF_TICKS:
        if len(found) < LEAST_TICKS and values:
            decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))))
            found = [step * 10.0**decade for decade in (*decades, decades.stop) for step in steps]
            found = [at for at in found if min(values) <= at <= max(values)]
    return tuple(Tick(at, short(at)) for at in found)


def short(number: float) -> str:
    """Return `number` in a few letters: 30k for 30,000, 1M for a million."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"
