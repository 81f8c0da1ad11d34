"""The sentences that a comparison says first: one for each mode, from the figures of its verdict."""

import math
from collections.abc import Sequence

from roundoff.errors import printable
from roundoff.runs.reading import Run
from roundoff.verdict.endpoint import end_losses
from roundoff.verdict.statistics import ALPHA, ENOUGH_PAIRS, MAX_SEEDS
from roundoff.verdict.types import Comparison, Difference, ModeSummary, Verdict


def said(comparison: Comparison) -> list[str]:
    """Return what was found, in plain words: a sentence for each mode but the reference.

    Two things come before: that the runs do not train the same job, and that the reference has diverged.
    """
    reference, *others = comparison.modes
    found = ["These runs do not train the same job."] if comparison.accepted else []
    found += _of_reference(reference)
    found += [_of_mode(mode, comparison) for mode in others]
    return found or [f"{_name(reference.label)} stands alone: a verdict takes another mode."]


def in_figures(found: Verdict | Difference, comparison: Comparison) -> str:
    """Return the difference and its interval, such as "+0.0010 nats [-0.0041, +0.0062]".

    A margin under 0.01 adds decimals. "" without a difference.
    """
    if found.difference is None:
        return ""
    decimals = max(4, 2 - math.floor(math.log10(comparison.margin)))
    size = f"{found.difference:+.{decimals}f} {comparison.short_unit}".rstrip()
    if found.interval is None:
        return size
    return f"{size} [{found.interval[0]:+.{decimals}f}, {found.interval[1]:+.{decimals}f}]"


def _name(label: str) -> str:
    return printable(label, 40)


def _of_reference(mode: ModeSummary) -> list[str]:
    where = _divergence(mode.runs)
    return [f"The reference, {_name(mode.label)}, {where}."] if where else []


def _of_mode(mode: ModeSummary, comparison: Comparison) -> str:
    verdict, name, other = mode.verdict, _name(mode.label), _name(comparison.reference)
    figures, where = in_figures(verdict, comparison), _divergence(mode.runs)
    if verdict.word == "diverged":
        return f"{name} {where or 'diverged'}."
    if verdict.word in ("equivalent", "better", "worse"):
        sentence = _decided(mode, figures, comparison)
    elif verdict.word == "undecided":
        needed = f"about {verdict.seeds_needed}" if verdict.seeds_needed else f"more than {MAX_SEEDS}"
        sentence = f"{verdict.pairs} seeds cannot tell {name} from {other}; {needed} would: the difference is {figures}"
    elif verdict.word == "described":
        count = "one seed is" if verdict.pairs == 1 else f"{verdict.pairs} seeds are"
        takes = f"described, not judged, which takes {ENOUGH_PAIRS}"
        sentence = f"{name} differs from {other} by {figures}; {count} {takes}"
    elif verdict.word == "incomplete":
        sentence = (
            f"{name} lacks seeds that {other} has, so it is not judged; with the other {verdict.pairs} the difference "
            f"is {figures}"
        )
    else:
        sentence = f"{name} cannot be compared: no seed of it has finished beside one of {other}"
    sentence += _on_test_data(mode, comparison)
    return f"{sentence}; it {where}." if where else f"{sentence}."


def _on_test_data(mode: ModeSummary, comparison: Comparison) -> str:
    """Return what the test loss shows that the sentence on the training loss does not.

    That is a difference of more than the margin, or one within it where the training loss shows no equivalence.
    """
    tested, word = mode.test_difference, mode.verdict.word
    if tested is None or tested.interval is None or tested.pairs < ENOUGH_PAIRS:
        return ""
    low, high = tested.interval
    if word in ("better", "worse", "undecided") and max(-low, high) <= comparison.margin:
        return f"; on the test data the difference is {in_figures(tested, comparison)}, within {comparison.margin:g}"
    sign = "worse" if low > comparison.margin else "better" if high < -comparison.margin else word
    return "" if sign == word else f"; on the test data it is {sign}, by {in_figures(tested, comparison)}"


def _decided(mode: ModeSummary, figures: str, comparison: Comparison) -> str:
    """Return the sentence on a mode that is equivalent, better or worse.

    A mode that trains equivalently is better or worse where its test loss shows so.
    """
    name, other, verdict = _name(mode.label), _name(comparison.reference), mode.verdict
    equivalent = verdict.p_equivalence is not None and verdict.p_equivalence < ALPHA
    if verdict.word != "equivalent" and not equivalent:
        return f"{name} trains {verdict.word} than {other} in this job: the difference is {figures}"
    within = f"the difference is {figures}{_within(verdict, comparison)}"
    if verdict.word == "equivalent" or mode.test_difference is None:
        return f"{name} trains as well as {other} in this job: {within}"
    tested = in_figures(mode.test_difference, comparison)
    return f"{name} is {verdict.word} than {other} on the test data, by {tested}; as to training, {within}"


def _within(verdict: Verdict, comparison: Comparison) -> str:
    """Return that an equivalent mode's difference is within the margin, and by which interval if not by that of 95%."""
    if verdict.interval is None or max(map(abs, verdict.interval)) <= comparison.margin:
        return f", within {comparison.margin:g}"
    return f"; its {100 * (1 - 2 * ALPHA / comparison.looks):.3g}% interval is within {comparison.margin:g}"


def _divergence(runs: Sequence[Run]) -> str:
    """Return when and in how many of the seeds `runs` diverged, such as "diverged at step 512 in 2 of 3 seeds"."""
    steps = sorted(_broken_from(run) for run in runs if _has_diverged(run))
    if not steps:
        return ""
    at = f"step {steps[0]}" if steps[0] == steps[-1] else f"steps {steps[0]} to {steps[-1]}"
    of = f" in {len(steps)} of {len(runs)} seeds" if len(runs) > 1 else ""
    return f"diverged at {at}{of}"


def _has_diverged(run: Run) -> bool:
    """Return whether `run` says so, or has finished with a loss that is not finite."""
    ends = [*end_losses([run]).values()]
    ends += [] if run.status != "finished" or run.test_loss is None else [run.test_loss]
    return run.status == "diverged" or not all(map(math.isfinite, ends))


def _broken_from(run: Run) -> int:
    """Return the first step from which on no step has changed a weight with a finite loss; the last one otherwise."""
    steps = run.steps["step"]
    sound = zip(run.steps["loss"], run.steps["applied"], strict=True)
    last = max((i for i, (loss, applied) in enumerate(sound) if applied and math.isfinite(loss)), default=-1)
    return int(steps[min(last + 1, len(steps) - 1)])
