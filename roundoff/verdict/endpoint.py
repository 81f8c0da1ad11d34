"""The figures at the end of a run that two modes are compared by.

The verdicts compare the end loss, the mean training loss of the second half of the steps. `docs/compare.md` has the
reasons.
"""

import math
from collections.abc import Iterable, Sequence

from roundoff.runs.reading import Run


def end_losses(runs: Iterable[Run], partners: Iterable[Run] = ()) -> dict[int, float]:
    """Return seed -> end loss of the finished `runs`; an interrupted run has trained for another length.

    A loss of a skipped step counts: it is that of the weights that the step left alone. Where it is not finite, it
    says nothing of them, and the step counts neither in the run nor in the run of `partners` with the same seed. So
    both means are of the same batches.

    The end loss is nan where no step of the run counts, and inf or nan where an applied step has such a loss.
    """
    others = {run.seed: run for run in _finished(partners)}
    return {run.seed: _end_loss(run, others.get(run.seed, run)) for run in _finished(runs)}


def losses_on_test_data(runs: Iterable[Run]) -> dict[int, float]:
    """Return seed -> loss on the test data of the finished `runs` that have one."""
    return {run.seed: run.test_loss for run in _finished(runs) if run.test_loss is not None}


def _finished(runs: Iterable[Run]) -> Sequence[Run]:
    return [run for run in runs if run.status == "finished"]


def _end_loss(run: Run, partner: Run) -> float:
    mine, theirs = _overflowed(run), _overflowed(partner)
    own = {step: loss for step, loss, _ in _end(run) if step not in mine}
    losses = [loss for step, loss in own.items() if step not in theirs] or own.values()
    return sum(losses) / len(losses) if losses else math.nan


def _overflowed(run: Run) -> set[int]:
    """Return the steps of the second half that were skipped with a loss that is not finite."""
    return {step for step, loss, applied in _end(run) if not applied and not math.isfinite(loss)}


def _end(run: Run) -> Iterable[tuple[int, float, bool]]:
    """Return step, loss and whether it was applied, of the second half of the steps, at least one."""
    first = len(run.steps["step"]) - max(1, len(run.steps["step"]) // 2)
    return zip(*(run.steps[name][first:] for name in ("step", "loss", "applied")), strict=True)
