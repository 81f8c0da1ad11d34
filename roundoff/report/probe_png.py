"""probe.png: error to noise of each tensor beside its share lost at every loss scale, as one picture."""

from pathlib import Path

from roundoff.errors import printable
from roundoff.gradients.advice import said
from roundoff.report import probe_view as view
from roundoff.report.panels import Panel
from roundoff.report.probe_panels import panels
from roundoff.report.probe_view import Result


def write_png(path: Path, result: Result) -> None:
    """Write the picture of `result`, which is what `roundoff.gradients.result.read_probe` returns.

    Raises:
        OSError: `path` cannot be written.
        UsageError: matplotlib is not installed.
    """
    from roundoff.report import matplotlib_painter as painter  # here, since the extra `report` has it

    legend = [(i, printable(mode, 40)) for i, mode in enumerate(view.modes(result))]
    painter.write(path, painter.paint([chosen(result)], legend, [said(result)], points=True))


def chosen(result: Result) -> list[Panel]:
    """Return the panels of the picture, with the same rows in each."""
    error, _, heat = panels(result, aligned=True)
    return [panel for panel in (error, heat) if panel.items]
