"""The description of a panel: everything that a picture shows, as data.

A builder makes a `Panel` from a comparison or from a probe, and a painter draws it. So the page and the PNG cannot
differ in a number. This module needs numpy alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
Side = Literal["x", "y"]

_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255")
_DASHES: tuple[tuple[int, ...], ...] = (
    (),
    (8, 3),
    (2, 2),
    (8, 3, 2, 3),
    (14, 4),
    (4, 2),
    (14, 3, 3, 3),
    (8, 3, 2, 3, 2, 3),
)


@dataclass(frozen=True)
class Style:
    """The look of a mode, which is the same in every panel.

    The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/). A wine red stands for their yellow, which
    vanishes on white. Dashes and markers tell the modes apart without colour, and equal curves show through each other.

    Attributes:
        colour: "#rrggbb".
        dash: lengths of stroke and gap in pixels; empty for a solid line.
        marker: index of the shape, 0 to 7.
    """

    colour: str
    dash: tuple[int, ...]
    marker: int


def style(mode: int) -> Style:
    """Return the style of the mode with the index `mode`; beyond 8 modes a colour returns with another dash."""
    turn = mode // len(_COLOURS)
    place = mode % len(_COLOURS)
    return Style(_COLOURS[place], _DASHES[(place + turn) % len(_DASHES)], place)


@dataclass(frozen=True)
class Tick:
    """A tick with its text and the exponent that is raised behind it."""

    at: float
    text: str
    exponent: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: its title.
        span: the values at its two ends; None leaves them to the painter. The first may be the larger one.
        log: its scale is logarithmic.
        ticks: where the ticks are; empty leaves them to the painter.
        whole: only whole numbers have a tick.
    """

    label: str
    span: tuple[float, float] | None = None
    log: bool = False
    ticks: tuple[Tick, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points. A y of nan leaves a gap.

    Attributes:
        mode: its index, which gives the style.
        name: of the mode.
        x, y: the points, few enough to draw all of them.
        weight: "strong" for a mode's first run, "thin" for the others, "pale" for single steps below a smoothed curve.
        hover: a format string for the text at the pointer, over the fields x, y and `exact`; "" for no text.
        exact: a further value for each point.
        markers: which points have a marker: all, none, or all of a curve that has few.
        steps: y holds until the next point.
    """

    mode: int
    name: str
    x: Floats | Steps
    y: Floats
    weight: Literal["strong", "thin", "pale"] = "strong"
    hover: str = ""
    exact: Floats | Steps | None = None
    markers: Literal["all", "few", "none"] = "few"
    steps: bool = False


@dataclass(frozen=True)
class Band:
    """A grey area between two curves, which comes and goes with `mode`."""

    mode: int
    x: Steps
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Marks:
    """Single points.

    Attributes:
        mode: the index of the mode; None for marks that belong to none.
        name: of the mode.
        x, y: the points.
        shape: "mode" for the marker of the mode.
        strong: as a `Curve` of that weight.
        hover: as in `Curve`, with the further field `text`.
        texts: one for each point, or none at all.
        exact: as in `Curve`.
        bars: lengths of the error bars to the left and to the right, or none at all.
    """

    mode: int | None
    name: str
    x: Floats | Steps
    y: Floats
    shape: Literal["mode", "cross", "triangle"] = "mode"
    strong: bool = True
    hover: str = ""
    texts: tuple[str, ...] = ()
    exact: Floats | None = None
    bars: tuple[Floats, Floats] | None = None


@dataclass(frozen=True)
class HeatMap:
    """A cell for each row and column, coloured by a value from -1 to 1.

    Attributes:
        x: the columns' positions, one apart; the rows stand at 0, 1, 2 and so on.
        z: the values, shape (rows, columns).
        colours: share of the way from -1 to 1, and the colour there.
        shades: value -> the text beside its colour in the legend.
        hover: as in `Marks`; `exact` is the list of a cell's further values there.
        texts: one for each row.
        exact: shape (rows, columns, values).
    """

    x: tuple[int, ...]
    z: Floats
    colours: tuple[tuple[float, str], ...]
    shades: dict[float, str]
    hover: str
    texts: tuple[str, ...]
    exact: Floats


@dataclass(frozen=True)
class Line:
    """A line from edge to edge, at the value `at` of the axis `side`; `width` in pixels."""

    side: Side
    at: float
    colour: str = "#000000"
    width: float = 1.5
    dotted: bool = False


@dataclass(frozen=True)
class Stretch:
    """A rectangle from edge to edge, from `low` to `high` on the axis `side`; a frame where `fill` is None."""

    side: Side
    low: float
    high: float
    fill: str | None = None


Item = Curve | Band | Marks | HeatMap | Line | Stretch


@dataclass(frozen=True)
class Panel:
    """A set of axes with what is drawn in them.

    Attributes:
        id: unique in its page.
        title: its name.
        caption: sentences that explain what is drawn, or say why nothing is.
        headline: title and explanation in one line, for a picture that has no captions.
        x, y: the axes.
        items: what is drawn, the lowest layer first; empty where there is nothing to draw.
        over_steps: x is the step, so that panels can share a zoom.
        rows: 0; otherwise y is a list of so many rows, each with a tick, and the panel grows with their number.
    """

    id: str
    title: str
    caption: str
    headline: str = ""
    x: Axis = Axis("")
    y: Axis = Axis("")
    items: tuple[Item, ...] = ()
    over_steps: bool = False
    rows: int = 0
