"""curves.png: the main panels of a comparison as one picture."""

from pathlib import Path

from roundoff.errors import printable
from roundoff.report import curves
from roundoff.report.comparison_panels import panels
from roundoff.report.panels import Panel
from roundoff.report.said import said
from roundoff.verdict.types import Comparison


def write_png(path: Path, comparison: Comparison) -> None:
    """Write the picture.

    Raises:
        OSError: `path` cannot be written.
        UsageError: matplotlib is not installed.
    """
    from roundoff.report import matplotlib_painter as painter  # here, since the extra `report` has it

    rows = chosen(comparison)
    if not rows:
        painter.write(path, painter.blank("No run has a step that could be drawn."))
        return
    legend = [
        (mode.index, printable(mode.label, 40) + (" (reference)" if mode.label == comparison.reference else ""))
        for mode in curves.modes(comparison)
    ]
    painter.write(path, painter.paint(rows, legend, said(comparison)))


def chosen(comparison: Comparison) -> list[list[Panel]]:
    """Return the panels of the picture, row by row: those that have something to draw, a loss scale if it changes."""
    drawn = {panel.id: panel for panel in panels(comparison, detailed=False) if panel.items}
    runs = [run for mode in comparison.modes for run in mode.runs]
    if all(len(set(run.steps["loss_scale"])) <= 1 for run in runs):
        drawn.pop("scale", None)
    rows = (["verdicts"], ["loss"], ["difference"], ["validation", "scale"])
    return [found for row in rows if (found := [drawn[name] for name in row if name in drawn])]
