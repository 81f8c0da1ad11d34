"""What report.html and curves.png draw, and how: positions, smoothing, bands of the reference's seeds, colours.

A curve's x is the number of the step, which is its position in the data: the same x is the same batch in every
mode, also after a step that was skipped.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
Band = tuple[Steps, Floats, Floats]
"""Steps, lower and upper edge."""

POINTS = 2000
"""At most as many points a curve; what is drawn of a longer run are points of it, not means."""

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
    """How a mode is drawn in every figure.

    The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/) with a wine red for their yellow, which
    vanishes on white. Dashes and markers tell the modes apart without colour, and let equal curves show through
    each other.

    Attributes:
        colour: "#rrggbb".
        dash: lengths of stroke and gap in pixels; empty for a solid line.
        marker: index of the shape, 0 to 7.
    """

    colour: str
    dash: tuple[int, ...]
    marker: int


@dataclass(frozen=True)
class Mode:
    """A mode with something to draw: its place in `Comparison.modes` and its runs of at least one step, by seed."""

    index: int
    label: str
    style: Style
    runs: list[Run]


def style(index: int) -> Style:
    """Of the mode at `index` in `Comparison.modes`; beyond 8 modes a colour returns with another dash."""
    turn = index // len(_COLOURS)
    place = index % len(_COLOURS)
    return Style(_COLOURS[place], _DASHES[(place + turn) % len(_DASHES)], place)


def modes(comparison: Comparison) -> list[Mode]:
    """The modes with a step to draw, the reference first."""
    found = [
        Mode(i, mode.label, style(i), [run for run in mode.runs if run.steps["step"]])
        for i, mode in enumerate(comparison.modes)
    ]
    return [mode for mode in found if mode.runs]


def layers(drawn: list[Mode]) -> list[tuple[Mode, Run, bool]]:
    """Each run with its mode, and whether it is the mode's first; the others come before, so that they lie below."""
    runs = [(mode, run, i == 0) for mode in drawn for i, run in enumerate(mode.runs)]
    return sorted(runs, key=lambda entry: entry[2])


def steps(run: Run) -> Steps:
    """The numbers of a run's steps, from 1."""
    return np.asarray(run.steps["step"], dtype=np.int64)


def column(run: Run, name: str) -> Floats:
    """A column of `steps.jsonl`, which may hold inf and nan."""
    return np.asarray(run.steps[name], dtype=np.float64)


def positive(values: Floats) -> Floats:
    """`values`, float32 once, for a logarithmic axis: nan where there is no logarithm."""
    return np.where(np.isfinite(values) & (values >= 2.0**-149), values, np.nan)


def window(drawn: list[Mode]) -> int:
    """How many steps a smoothed curve averages: a fiftieth of the longest run, odd; 1 leaves short runs as they are."""
    longest = max((len(run.steps["step"]) for mode in drawn for run in mode.runs), default=0)
    return longest // 50 // 2 * 2 + 1


def smooth(values: Floats, window: int) -> Floats:
    """Mean of the finite values among the `window` around each; nan where the value itself is inf or nan."""
    finite = np.isfinite(values)
    ones, half = np.ones(window), window // 2
    inside = slice(half, half + len(values))
    # Not by differences of a running sum: a loss of 1e30 would leave its rounding error in all that follows.
    sums = np.convolve(np.where(finite, values, 0.0), ones)[inside]
    counts = np.convolve(finite.astype(np.float64), ones)[inside]
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def spread_out(count: int, limit: int = POINTS) -> Steps:
    """At most `limit` indices of `range(count)`, the first and the last among them, at even distances."""
    if count <= limit:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, limit).round().astype(np.int64))


def extremes(values: Floats, limit: int = POINTS) -> Steps:
    """At most `limit` indices of `values` that keep its least and greatest value in each stretch.

    Values that are not finite are never chosen from a stretch that has others.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2)
    low = [s[np.argmin(np.where(np.isfinite(values[s]), values[s], np.inf))] for s in stretches]
    high = [s[np.argmax(np.where(np.isfinite(values[s]), values[s], -np.inf))] for s in stretches]
    return np.unique(np.array(low + high, dtype=np.int64))


def difference(run: Run, reference: Mode) -> tuple[Steps, Floats] | None:
    """Training loss of `run` minus that of the reference's run with the same seed, at the steps that both have."""
    other = next((candidate for candidate in reference.runs if candidate.seed == run.seed), None)
    if other is None:
        return None
    common, mine, others = np.intersect1d(steps(run), steps(other), return_indices=True)
    with np.errstate(invalid="ignore"):  # inf - inf
        return common, column(run, "loss")[mine] - column(other, "loss")[others]


def band(reference: Mode, window: int) -> Band | None:
    """Least and greatest smoothed loss of the reference's seeds; None with fewer than two.

    It covers the steps at which all of them have a finite loss.
    """
    found = _smoothed_losses(reference, window)
    return found and (found[0], found[1].min(axis=0), found[1].max(axis=0))


def noise(reference: Mode, window: int) -> Band | None:
    """How far the reference's seeds lie from their mean: the least and greatest smoothed deviation, as in `band`."""
    found = _smoothed_losses(reference, window)
    if found is None:
        return None
    deviations = found[1] - found[1].mean(axis=0)
    return found[0], deviations.min(axis=0), deviations.max(axis=0)


def _smoothed_losses(reference: Mode, window: int) -> tuple[Steps, Floats] | None:
    if len(reference.runs) < 2:
        return None
    common = steps(reference.runs[0])
    for run in reference.runs[1:]:
        common = np.intersect1d(common, steps(run))
    losses = np.stack([smooth(column(run, "loss"), window)[np.isin(steps(run), common)] for run in reference.runs])
    finite = np.isfinite(losses).all(axis=0)
    return (common[finite], losses[:, finite]) if finite.any() else None


def limits(curves: list[tuple[Run, Floats]]) -> tuple[float, float] | None:
    """Range of y that shows all runs but those that diverged, which would flatten the others; None without a value.

    Where all diverged, it leaves out the highest twentieth of the values.
    """
    steady = [values for run, values in curves if run.status != "diverged"]
    values = np.concatenate(steady or [values for _, values in curves] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max() if steady else np.quantile(values, 0.95))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def epoch_ends(drawn: list[Mode], most: int = 40) -> list[float]:
    """Positions between the last step of an epoch and the first of the next, in the longest run; [] if over `most`."""
    longest = max((run for mode in drawn for run in mode.runs), key=lambda run: len(run.steps["step"]))
    changes = np.flatnonzero(np.diff(np.asarray(longest.steps["epoch"])))
    return [] if len(changes) > most else (steps(longest)[changes] + 0.5).tolist()


def reach(differences: list[tuple[Run, Floats]], band: Band | None) -> float:
    """Half of a symmetric range of y that shows the smoothed differences, without diverged runs', and the band."""
    steady = [values for run, values in differences if run.status != "diverged"]
    values = np.concatenate([*steady, *(band[1:] if band else [])] or [np.empty(0)])
    values = np.abs(values[np.isfinite(values)])
    return 1.1 * float(values.max(initial=0.0)) or 1e-3


def epochs(run: Run, drawn: list[Mode]) -> tuple[Floats, Floats]:
    """Positions and validation perplexities; where epochs are few the modes stand side by side, not over each other."""
    number = np.array([row["epoch"] for row in run.epochs], dtype=np.float64)
    place = next(i for i, mode in enumerate(drawn) if mode.label == run.label)
    aside = 0.05 * (place - (len(drawn) - 1) / 2) if last_epoch(drawn) < 4 else 0.0
    perplexities = np.array([row["valid_ppl"] for row in run.epochs], dtype=np.float64)
    return number + aside, np.where(np.abs(perplexities) < 1e300, perplexities, np.nan)  # no axis could hold the rest


def last_epoch(drawn: list[Mode]) -> int:
    """The last epoch that a run has completed; 0 if none has."""
    return max((row["epoch"] for mode in drawn for run in mode.runs for row in run.epochs), default=0)


def loss_scale(run: Run) -> tuple[Steps, Floats, Steps]:
    """Loss scale at the steps that are enough to draw all of it, and indices among these of the skipped steps.

    They are the first, the last, the skipped ones, and those on both sides of every change.
    """
    scales = positive(column(run, "loss_scale"))
    skipped = ~np.asarray(run.steps["applied"], dtype=bool)
    changes = np.flatnonzero(np.diff(scales)) + 1
    kept = np.unique(np.concatenate([[0, len(scales) - 1], changes - 1, changes, np.flatnonzero(skipped)]))
    kept = kept.astype(np.int64)[spread_out(len(kept), 2 * POINTS)]
    return steps(run)[kept], scales[kept], np.flatnonzero(skipped[kept])
