"""The numbers of the curves: positions, smoothing, bands of the reference's seeds, limits of the axes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from roundoff.report.panels import Floats, Steps
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison

Band = tuple[Steps, Floats, Floats]
"""Steps, lower and upper edge."""

POINTS = 2000
"""At most as many points a curve; what is drawn of a longer run are points of it, not means."""


@dataclass(frozen=True)
class Mode:
    """A mode with something to draw: its index in `Comparison.modes`, and its runs of at least one step, by seed."""

    index: int
    label: str
    runs: list[Run]


def modes(comparison: Comparison) -> list[Mode]:
    """Return the modes with a step to draw, the reference first."""
    found = [
        Mode(i, mode.label, [run for run in mode.runs if run.steps["step"]]) for i, mode in enumerate(comparison.modes)
    ]
    return [mode for mode in found if mode.runs]


def with_arrays(mode: Mode) -> Mode:
    """Return `mode` with arrays as columns of its runs, which each panel would make again of lists otherwise."""
    return replace(mode, runs=[_with_arrays(run) for run in mode.runs])


def _with_arrays(run: Run) -> Run:
    columns: dict[str, Any] = {name: np.asarray(run.steps[name], dtype) for name, dtype in _COLUMNS.items()}
    return replace(run, steps=columns)


_COLUMNS = {
    "step": np.int64,
    "epoch": np.int64,
    "loss": np.float64,
    "grad_norm": np.float64,
    "loss_scale": np.float64,
    "applied": np.bool_,
}


def layers(drawn: list[Mode]) -> list[tuple[Mode, Run, bool]]:
    """Return each run with its mode and whether it is the mode's first; the others come before, and lie below."""
    runs = [(mode, run, i == 0) for mode in drawn for i, run in enumerate(mode.runs)]
    return sorted(runs, key=lambda entry: entry[2])


def steps(run: Run) -> Steps:
    """Return the numbers of a run's steps, from 1."""
    return np.asarray(run.steps["step"], dtype=np.int64)


def column(run: Run, name: str) -> Floats:
    """Return a column of `steps.jsonl`, which may hold inf and nan."""
    return np.asarray(run.steps[name], dtype=np.float64)


def further(run: Run, name: str) -> Floats:
    """Return a further loss of the steps; nan where a step, or the run, has none of that name."""
    return np.asarray(run.losses.get(name, [np.nan] * len(run.steps["step"])), dtype=np.float64)


def positive(values: Floats) -> Floats:
    """Return `values` for a logarithmic axis: nan where a float32 has no logarithm."""
    return np.where(np.isfinite(values) & (values >= 2.0**-149), values, np.nan)


def window(drawn: list[Mode]) -> int:
    """Return how many steps a mean covers: a fiftieth of the longest run, odd; 1 leaves short runs as they are."""
    longest = max((len(run.steps["step"]) for mode in drawn for run in mode.runs), default=0)
    return longest // 50 // 2 * 2 + 1


def smooth(values: Floats, window: int) -> Floats:
    """Return the mean of the finite values among the `window` around each; nan where the value itself is not finite."""
    finite = np.isfinite(values)
    sums = _sums(np.where(finite, values, 0.0), window)
    counts = _sums(finite.astype(np.float64), window)
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def _sums(values: Floats, window: int) -> Floats:
    """Return the sum of the `window` values, an odd number, around each; what lies beyond the ends counts as 0.

    It adds sums of 1, 2, 4, 8 and so on values, and never subtracts: differences of a running sum would leave the
    rounding error of a loss of 1e30 in all that follows it.
    """
    count, half = len(values), window // 2
    power = np.concatenate([np.zeros(half), values, np.zeros(half)])  # sums of `width` values from each place on
    total, start, width = np.zeros(count), 0, 1
    while window:
        if window & 1:
            total += power[start : start + count]
            start += width
        window >>= 1
        if window:
            power = power[:-width] + power[width:]
            width *= 2
    return total


def spread_out(count: int, limit: int = POINTS) -> Steps:
    """Return at most `limit` indices of `range(count)` at even distances, the first and the last among them."""
    if count <= limit:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, limit).round().astype(np.int64))


def extremes(values: Floats, limit: int = POINTS) -> Steps:
    """Return at most `limit` indices of `values`: those of the least and the greatest value in each stretch.

    A stretch yields values that are not finite only where it has no others.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2)
    low = [s[np.argmin(np.where(np.isfinite(values[s]), values[s], np.inf))] for s in stretches]
    high = [s[np.argmax(np.where(np.isfinite(values[s]), values[s], -np.inf))] for s in stretches]
    return np.unique(np.array(low + high, dtype=np.int64))


def difference(run: Run, reference: Mode) -> tuple[Steps, Floats] | None:
    """Return the steps that `run` and the reference's run with its seed have, and its loss minus the reference's."""
    other = next((candidate for candidate in reference.runs if candidate.seed == run.seed), None)
    if other is None:
        return None
    ours, theirs = steps(run), steps(other)
    mine, others = np.isin(ours, theirs, assume_unique=True), np.isin(theirs, ours, assume_unique=True)
    with np.errstate(invalid="ignore"):  # inf - inf
        return ours[mine], column(run, "loss")[mine] - column(other, "loss")[others]


def band(reference: Mode, window: int) -> Band | None:
    """Return the least and the greatest smoothed loss of the reference's seeds; None with fewer than two.

    The band covers the steps at which all of them have a finite loss.
    """
    found = _smoothed_losses(reference, window)
    return found and (found[0], found[1].min(axis=0), found[1].max(axis=0))


def noise(reference: Mode, window: int) -> Band | None:
    """Return the least and the greatest deviation of the reference's seeds from their mean, smoothed as in `band`."""
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
        common = common[np.isin(common, steps(run), assume_unique=True)]
    kept = [np.isin(steps(run), common, assume_unique=True) for run in reference.runs]
    losses = np.stack([smooth(column(run, "loss"), window)[k] for run, k in zip(reference.runs, kept, strict=True)])
    finite = np.isfinite(losses).all(axis=0)
    return (common[finite], losses[:, finite]) if finite.any() else None


def limits(curves: list[tuple[Run, Floats]]) -> tuple[float, float] | None:
    """Return a range of y that shows all runs but those that diverged, which would flatten the others.

    Where all diverged, the range leaves out the highest twentieth of the values. Without a value it is None.
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
    """Return the positions between the epochs of the longest run; [] if there are more than `most`."""
    longest = max((run for mode in drawn for run in mode.runs), key=lambda run: len(run.steps["step"]))
    changes = np.flatnonzero(np.diff(np.asarray(longest.steps["epoch"])))
    return [] if len(changes) > most else (steps(longest)[changes] + 0.5).tolist()


def reach(differences: list[tuple[Run, Floats]], band: Band | None) -> float:
    """Return half of a symmetric range of y that shows the band and the differences of runs that did not diverge."""
    steady = [values for run, values in differences if run.status != "diverged"]
    values = np.concatenate([*steady, *(band[1:] if band else [])] or [np.empty(0)])
    values = np.abs(values[np.isfinite(values)])
    return 1.1 * float(values.max(initial=0.0)) or 1e-3


def epochs(run: Run, drawn: list[Mode], name: str) -> tuple[Floats, Floats]:
    """Return positions and the figures `name` of the epochs. Where epochs are few, the modes stand side by side."""
    number = np.array([row["epoch"] for row in run.epochs], dtype=np.float64)
    place = next(i for i, mode in enumerate(drawn) if mode.label == run.label)
    aside = 0.05 * (place - (len(drawn) - 1) / 2) if last_epoch(drawn) < 4 else 0.0
    figures = np.array([row[name] for row in run.epochs], dtype=np.float64)
    return number + aside, np.where(np.abs(figures) < 1e300, figures, np.nan)  # no axis could hold the rest


def last_epoch(drawn: list[Mode]) -> int:
    """Return the last epoch that a run has completed; 0 if none has."""
    return max((row["epoch"] for mode in drawn for run in mode.runs for row in run.epochs), default=0)


def loss_scale(run: Run) -> tuple[Steps, Floats, Steps]:
    """Return the steps that are enough to draw the loss scale, its values, and indices of the skipped steps among them.

    These steps are the first, the last, the skipped ones, and those on both sides of every change.
    """
    scales = positive(column(run, "loss_scale"))
    skipped = ~np.asarray(run.steps["applied"], dtype=bool)
    changes = np.flatnonzero(np.diff(scales)) + 1
    kept = np.unique(np.concatenate([[0, len(scales) - 1], changes - 1, changes, np.flatnonzero(skipped)]))
    kept = kept.astype(np.int64)[spread_out(len(kept), 2 * POINTS)]
    return steps(run)[kept], scales[kept], np.flatnonzero(skipped[kept])
