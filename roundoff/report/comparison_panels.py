"""The panels of a comparison: verdicts, training loss, differences, validation, loss scale and gradient norm.

The x of a curve is the number of the step, which is its position in the data: the same x is the same batch in every
mode, also after a step that was skipped.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from roundoff.errors import printable
from roundoff.report import curves
from roundoff.report.curves import Mode
from roundoff.report.panels import Axis, Band, Curve, Floats, Item, Line, Marks, Panel, Steps, Stretch, Tick
from roundoff.report.said import in_figures
from roundoff.runs.reading import Run
from roundoff.verdict.types import LONGEST_UNIT, Comparison

VERDICTS = "verdicts"
"""The id of the panel of the verdicts."""

JUDGED = ("equivalent", "better", "worse", "undecided", "incomplete", "diverged")
"""Verdicts that a picture shows; one seed or two are described only."""

LONG = 100_000
"""From so many steps on, a caption says that lines go through some of the points only."""

EXACT = "{y:.5g} (this step exactly {exact:.9g})"  # 9 digits tell every fp32 number from its neighbours


@dataclass(frozen=True)
class _Subject:
    """The modes to draw, which of them is the reference, the steps of a mean, and whether details are drawn too."""

    modes: list[Mode]
    reference: Mode | None
    window: int
    detailed: bool
    unit: str = ""
    short_unit: str = ""
    has_perplexity: bool = False

    @property
    def seeds(self) -> int:
        """The most runs that a mode has."""
        return max(len(mode.runs) for mode in self.modes)


def panels(comparison: Comparison, detailed: bool = True) -> list[Panel]:
    """Return all panels; none where no run has a step. That of the verdicts is first, where a mode is judged.

    Args:
        comparison: of the runs.
        detailed: with single steps and the ends of the epochs, for which a small picture has no room.
    """
    drawn = [curves.with_arrays(mode) for mode in curves.modes(comparison)]
    if not drawn:
        return []
    forest = [_verdicts(comparison)] if any(mode.verdict.word in JUDGED for mode in comparison.modes) else []
    reference = next((mode for mode in drawn if mode.label == comparison.reference), None)
    unit, short = [f", {printable(u, LONGEST_UNIT)}" if u else "" for u in (comparison.unit, comparison.short_unit)]
    subject = _Subject(drawn, reference, curves.window(drawn), detailed, unit, short, comparison.has_perplexity)
    found = forest + [build(subject) for build in (_loss, _difference, _size, _validation, _loss_scale)]
    if not all(np.isnan(curves.column(run, "grad_norm")).all() for mode in drawn for run in mode.runs):
        found.append(_grad_norm(subject))
    names = dict.fromkeys(name for mode in drawn for run in mode.runs for name in run.losses)
    return found + [_further(subject, name, f"further-{i}") for i, name in enumerate(names)]


def _verdicts(comparison: Comparison) -> Panel:
    """Return the forest plot: a row for each mode but the reference, with its interval against margin and 0.

    A mode without an interval, or that has diverged, has its verdict in place of a mark.
    """
    ticks, marks, ends = list[Tick](), list[Item](), [comparison.margin]
    for row, (index, mode) in enumerate(list(enumerate(comparison.modes))[1:]):
        verdict, label = mode.verdict, printable(mode.label, 30)
        if verdict.difference is None or verdict.interval is None or verdict.word == "diverged":
            ticks.append(Tick(row, f"{label}: {verdict.word}"))
            continue
        ticks.append(Tick(row, label))
        low, high = verdict.interval
        ends += [abs(low), abs(high)]
        marks.append(
            Marks(
                index,
                mode.label,
                np.array([verdict.difference]),
                np.array([float(row)]),
                hover="{text}",
                texts=(f"{verdict.word}: {in_figures(verdict, comparison)}",),
                bars=(np.array([verdict.difference - low]), np.array([high - verdict.difference])),
            )
        )
    margin, unit = f"{comparison.margin:g} {comparison.short_unit}".rstrip(), comparison.short_unit
    caption = (
        f"A row a mode: its {comparison.end} minus that of {comparison.reference}, mean over the seeds with its 95% "
        f"interval; left of 0 is better. Green: differences of less than {margin}. An interval inside it means "
        "equivalent, and one that does not reach 0 means that the mode differs. A mode that diverged has no mark."
    )
    headline = f"Difference to {comparison.reference} with its 95% interval; green: within {margin}"
    reach = 1.1 * max(ends)
    x = Axis(f"difference{f', {unit}' if unit else ''}", (-reach, reach))
    y = Axis("", (len(ticks) - 0.5, -0.5), ticks=tuple(ticks))
    band = Stretch("x", -comparison.margin, comparison.margin, "#d9efe3")
    items = (band, Line("x", 0.0), *marks)
    return Panel(VERDICTS, "Intervals and margin", caption, headline, x, y, items, rows=len(ticks))


def _over_steps(subject: _Subject) -> tuple[Axis, tuple[Item, ...]]:
    """Return the axis of the steps, and dotted lines at the ends of the epochs."""
    last = max(int(curves.steps(run)[-1]) for mode in subject.modes for run in mode.runs)
    pad = max(0.5, last * 0.01)
    ends = curves.epoch_ends(subject.modes) if subject.detailed else []
    lines = tuple(Line("x", end, "#bbbbbb", 1, dotted=True) for end in ends)
    return Axis("step (position in the data)", (1 - pad, last + pad), whole=True), lines


def _curve(
    mode: Mode, first: bool, x: Floats | Steps, y: Floats, hover: str, most: int = curves.POINTS, **more: Any
) -> Curve:
    """Return the curve of one run through at most `most` points, with gaps where y is not finite.

    A mode's first run is strong and answers the pointer. `more` are further fields of the curve.
    """
    kept = curves.spread_out(len(x), most)
    points = x[kept], np.where(np.isfinite(y), y, np.nan)[kept]
    exact = more.pop("exact", None)
    if not first:
        return Curve(mode.index, mode.label, *points, "thin", **more)
    return Curve(mode.index, mode.label, *points, "strong", hover, None if exact is None else exact[kept], **more)


def _band(reference: Mode, found: curves.Band) -> Band:
    at, low, high = found
    kept = curves.spread_out(len(at))
    return Band(reference.index, at[kept], low[kept], high[kept])


def _singles(subject: _Subject, name: str) -> tuple[list[Item], list[tuple[Run, Floats]]]:
    """Return the single steps of each mode's first run, and the range of all but the rarest for the y axis."""
    items, shown = list[Item](), list[tuple[Run, Floats]]()
    for mode in subject.modes if subject.detailed and subject.window > 1 else []:
        run = mode.runs[0]
        values = curves.column(run, name)
        values = curves.positive(values) if name == "grad_norm" else values
        finite = np.isfinite(values)
        kept = curves.extremes(values)
        x, y = curves.steps(run)[kept], np.where(finite, values, np.nan)[kept]
        items.append(Curve(mode.index, mode.label, x, y, "pale", markers="none"))
        if finite.any():
            shown.append((run, np.quantile(values[finite], [0.002, 0.998])))
    return items, shown


def _loss(subject: _Subject) -> Panel:
    x, lines = _over_steps(subject)
    caption = f"{_smoothing(subject)}{_seeds(subject)}"
    headline = f"Training loss{_mean(subject)}" + ("; thin: other seeds than the first" if subject.seeds > 1 else "")
    items = list(lines)
    reference = subject.reference
    band = reference and curves.band(reference, subject.window)
    if reference and band:
        items.append(_band(reference, band))
        caption += f" Grey band: least to greatest smoothed loss of the {len(reference.runs)} seeds of the reference."
        headline += f"; grey: all {len(reference.runs)} seeds of the reference"
    singles, shown = _singles(subject, "loss")
    items += singles
    for mode, run, first in curves.layers(subject.modes):
        loss = curves.column(run, "loss")
        smoothed = curves.smooth(loss, subject.window)
        shown.append((run, smoothed))
        items.append(_curve(mode, first, curves.steps(run), smoothed, EXACT, exact=loss))
    y = Axis(f"training loss{subject.unit}", curves.limits(shown))
    return Panel("loss", "Training loss", caption, headline, x, y, tuple(items), over_steps=True)


def _difference(subject: _Subject) -> Panel:
    title = "Difference to the reference"
    reference = subject.reference
    if reference is None:
        return Panel("difference", title, "The reference has no step to compare with.")
    x, lines = _over_steps(subject)
    caption = (
        f"Training loss minus that of the reference ({reference.label}) on the same batch, with the same seed; below "
        f"zero is better. {_smoothing(subject, raw=False)}{_seeds(subject)}"
    )
    headline = f"Training loss minus the reference's at the same batch and seed{_mean(subject)}"
    items = [*lines, Line("y", 0.0)]
    band = curves.noise(reference, subject.window)
    if band:
        items.append(_band(reference, band))
        caption += " Grey band: how far the reference's own seeds lie from their mean."
        headline += "; grey: its seeds around their mean"
    shown = []
    for mode, run, first, at, difference in _differences(subject):
        smoothed = curves.smooth(difference, subject.window)
        shown.append((run, smoothed))
        items.append(_curve(mode, first, at, smoothed, EXACT, exact=difference))
    if not shown:
        return Panel("difference", title, "No other mode has a step and a seed in common with the reference.")
    limit = curves.reach(shown, band)
    y = Axis(f"difference in training loss{subject.short_unit}", (-limit, limit))
    return Panel("difference", title, caption, headline, x, y, tuple(items), over_steps=True)


def _differences(subject: _Subject) -> list[tuple[Mode, Run, bool, Steps, Floats]]:
    """Return, for each run that has one, its difference to the reference's run with the same seed."""
    drawn = []
    for mode, run, first in curves.layers(subject.modes):
        if subject.reference is not None and mode is not subject.reference:
            found = curves.difference(run, subject.reference)
            drawn += [] if found is None else [(mode, run, first, *found)]
    return drawn


def _size(subject: _Subject) -> Panel:
    title = "Size of the difference"
    x, lines = _over_steps(subject)
    items, shown = list(lines), []
    for mode, run, first, at, difference in _differences(subject):
        size = np.abs(difference)
        smoothed = curves.positive(curves.smooth(size, subject.window))
        shown.append((run, smoothed))
        items.append(_curve(mode, first, at, smoothed, EXACT, exact=size))
    span = _log_limits(shown)
    if span is None:
        return Panel("size", title, "No step differs from the reference's with the same seed.")
    caption = (
        f"The same without its sign, on a logarithmic axis: where rounding first tells, and how it grows. "
        f"{_smoothing(subject, raw=False)} Where nothing differs there is no line."
    )
    y = Axis(f"size of the difference{subject.short_unit}", span, log=True)
    return Panel("size", title, caption, title, x, y, tuple(items), over_steps=True)


def _validation(subject: _Subject) -> Panel:
    name, title = (
        ("valid_ppl", "Validation perplexity") if subject.has_perplexity else ("valid_loss", "Validation loss")
    )
    last = curves.last_epoch(subject.modes)
    if not last:
        return Panel("validation", title, "No run has completed an epoch.")
    items, shown = list[Item](), []
    for mode, run, first in curves.layers(subject.modes):
        if not run.epochs:
            continue
        x, values = curves.epochs(run, subject.modes, name)
        shown.append((run, values))
        hover = "epoch {exact:g}: {y:.6g}"
        items.append(_curve(mode, first, x, values, hover, exact=x.round(), markers="all"))
    caption = "At the end of each epoch; modes may stand side by side so as not to hide each other."
    across = Axis("epoch", (0.6, last + 0.4), whole=True)
    y = Axis(title.lower() + ("" if subject.has_perplexity else subject.unit), curves.limits(shown))
    return Panel("validation", title, caption + _seeds(subject), title, across, y, tuple(items))


def _loss_scale(subject: _Subject) -> Panel:
    title = "Loss scale and skipped steps"
    x, lines = _over_steps(subject)
    items, shown, most_changes = list(lines), [], 0
    for mode, run, first in curves.layers(subject.modes):
        at, scales, skipped = curves.loss_scale(run)
        most_changes = max(most_changes, len(at))
        shown.append(np.log2(scales[np.isfinite(scales)]))
        items.append(_curve(mode, first, at, scales, "{y:g}", len(at), markers="none", steps=True))
        if len(skipped):
            hover = "skipped at {y:g}" if first else ""
            name = f"{mode.label}, skipped"
            items.append(Marks(mode.index, name, at[skipped], scales[skipped], "cross", first, hover))
    powers = np.concatenate(shown)
    if not len(powers):
        return Panel("scale", title, "No run has a loss scale that could be drawn.")
    low, high = int(np.floor(powers.min())), int(np.ceil(powers.max()))
    ticks = tuple(Tick(2.0**power, "2", str(power)) for power in range(low, high + 1, max(1, (high - low) // 8)))
    caption = (
        "The factor that each step's loss was multiplied by, on a logarithmic axis of base 2; crosses: steps skipped "
        "because a gradient was inf or nan." + _seeds(subject)
    )
    if most_changes >= 2 * curves.POINTS:
        caption += f" Of a run with more changes and skipped steps, {2 * curves.POINTS} are drawn."
    y = Axis("loss scale", (2.0 ** (low - 1), 2.0 ** (high + 1)), log=True, ticks=ticks)
    return Panel("scale", title, caption, "Loss scale; crosses: skipped steps", x, y, tuple(items), over_steps=True)


def _grad_norm(subject: _Subject) -> Panel:
    title = "Gradient norm"
    x, lines = _over_steps(subject)
    singles, shown = _singles(subject, "grad_norm")
    items = [*lines, *singles]
    for mode, run, first in curves.layers(subject.modes):
        norm = curves.positive(curves.column(run, "grad_norm"))
        smoothed = np.exp(curves.smooth(np.log(norm), subject.window))
        shown.append((run, smoothed))
        items.append(_curve(mode, first, curves.steps(run), smoothed, EXACT, exact=norm))
    span = _log_limits(shown)
    if span is None:
        return Panel("norm", title, "No run has a finite gradient norm above zero.")
    caption = (
        f"L2 norm of the unscaled gradients before clipping, on a logarithmic axis. {_smoothing(subject, 'geometric ')}"
        " Steps whose norm is zero, inf or nan leave a gap." + _seeds(subject)
    )
    y = Axis(title.lower(), span, log=True)
    return Panel("norm", title, caption, title, x, y, tuple(items), over_steps=True)


def _further(subject: _Subject, name: str, place: str) -> Panel:
    """Return the panel of a further loss that the steps name."""
    title = f"Loss: {printable(name, 40)}"
    x, lines = _over_steps(subject)
    items, shown = list(lines), []
    for mode, run, first in curves.layers(subject.modes):
        values = curves.further(run, name)
        smoothed = curves.smooth(values, subject.window)
        shown.append((run, smoothed))
        items.append(_curve(mode, first, curves.steps(run), smoothed, EXACT, exact=values))
    span = curves.limits(shown)
    if span is None:
        return Panel(place, title, "No run has a finite value of it.")
    caption = f"{_smoothing(subject, raw=False)}{_seeds(subject)}"
    return Panel(place, title, caption, title, x, Axis(printable(name, 40), span), tuple(items), over_steps=True)


def _log_limits(shown: list[tuple[Run, Floats]]) -> tuple[float, float] | None:
    """Return the limits of a logarithmic axis."""
    span = curves.limits([(run, np.log10(values)) for run, values in shown])
    return span and (10.0 ** span[0], 10.0 ** span[1])


def _mean(subject: _Subject) -> str:
    return f", mean of {subject.window} steps" if subject.window > 1 else ""


def _smoothing(subject: _Subject, kind: str = "", raw: bool = True) -> str:
    if subject.window == 1:
        return "Every step as it is."
    pale = (
        f" Pale: single steps; of a run of more than {curves.POINTS}, the least and the greatest of each stretch."
        if raw
        else ""
    )
    thinned = f" Lines have {curves.POINTS} points at even distances." if _is_long(subject) else ""
    return f"Lines: {kind}mean of {subject.window} steps around each.{thinned}{pale}"


def _is_long(subject: _Subject) -> bool:
    """Return whether a run has so many steps that not all of them are drawn."""
    return max(len(run.steps["step"]) for mode in subject.modes for run in mode.runs) > LONG


def _seeds(subject: _Subject) -> str:
    if subject.seeds == 1:
        return ""
    return " Strong: the first seed, which also answers the pointer; thin: the other seeds."
