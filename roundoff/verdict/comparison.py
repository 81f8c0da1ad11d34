"""Puts runs side by side: do they train the same job, how does each mode end, and where does the first bit differ?"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from roundoff.errors import UsageError, printable
from roundoff.runs.reading import Run, machine, perplexity
from roundoff.verdict.differences import all_differences, canonical, refused_differences
from roundoff.verdict.endpoint import end_losses, losses_on_test_data
from roundoff.verdict.labels import named, tell_apart
from roundoff.verdict.statistics import heed_test_loss, interval, judge, paired_by_seed
from roundoff.verdict.types import (
    BitEquality,
    Comparison,
    Difference,
    Equivalence,
    Failure,
    ModeSummary,
    Verdict,
    short_unit,
)

WIDE = ("float32", "float64")
"""Dtypes in which a power of two as loss scale changes no bit. Half dtypes overflow and underflow."""


def compare_runs(
    runs: Sequence[Run] | Mapping[str, Run | Sequence[Run]],
    failures: Sequence[Failure] = (),
    *,
    reference: str | None = None,
    margin: float = 0.01,
    expect_equal: Sequence[tuple[str, str]] = (),
    expect_equivalent: Sequence[tuple[str, str]] = (),
    anyway: bool = False,
    flags: bool = False,
    looks: int = 1,
) -> Comparison:
    """Compare the modes of `runs`, each with every seed it has.

    A mode that ran at several loss scales is several modes here, with names such as "manual-scale-128". So is one
    with two runs of one seed: they are called by what differs, as "fp32 lr=5", else by a folder of theirs. The verdicts
    compare the mean training loss of the second half of the steps of the runs that have finished. The difference of
    the test losses stands beside it. A mode is not equivalent whose test loss surely differs by more than the margin.

    Args:
        runs: runs of any modes, none twice. Their order is the order of the modes. A mapping names them: label -> a
            run, or one for each seed. A group that has a name may differ from the others in job and settings, which
            `Comparison.differences` then lists; in data, unit and seeds it may not.
        failures: runs that left nothing.
        reference: label of the mode to compare with; by default "fp32" if it has a run, else the first that has one.
        margin: margin of equivalence in the losses' own unit, above 0.
        expect_equal: pairs of labels whose bit-equality is asked for. They come first in `Comparison.pairs`, as
            given; the pairs that must agree by design follow.
        expect_equivalent: pairs of labels whose equivalence is asked for, the second one's to the first. They are
            `Comparison.equivalences`, in this order.
        anyway: accept runs of different jobs, and list the differences.
        flags: errors name the options of a command line, such as --anyway, in place of the arguments.
        looks: how often the verdicts may be looked at while seeds are added. The risk of 5% is that of all looks.

    Raises:
        UsageError: a label is unknown, a run is there twice, or the runs do not train the same job.
    """
    runs = tell_apart(named(runs))
    labels = list(dict.fromkeys([run.label for run in runs] + [failure.label for failure in failures]))
    if not labels:
        raise UsageError("no runs to compare; give at least one run directory")
    _refuse_duplicates(runs)
    if reference is None:
        trained = [run.label for run in runs] or labels
        reference = "fp32" if "fp32" in trained else trained[0]
    _refuse_unknown(labels, "--reference" if flags else "reference", [reference])
    _check_pairs(labels, "--expect-equal" if flags else "expect_equal", expect_equal)
    _check_pairs(labels, "--expect-equivalent" if flags else "expect_equivalent", expect_equivalent)
    labels.sort(key=lambda label: label != reference)
    modes = {label: sorted((r for r in runs if r.label == label), key=lambda run: run.seed) for label in labels}
    failed = {label: [failure for failure in failures if failure.label == label] for label in labels}
    refused = refused_differences(modes, failed)
    if refused and not anyway:
        way = "add --anyway" if flags else "give anyway=True"
        raise UsageError(f"these runs do not train the same job: {'; '.join(refused)}; leave some out, or {way}")
    unit = runs[0].loss_unit if len({run.loss_unit for run in runs}) == 1 else None
    differences = all_differences(modes, failed)
    found = Comparison(reference, margin, [], [], [], differences, unit=unit, looks=looks, accepted=refused)
    rows = [_summarize(label, modes[label], failed[label], modes[reference], found) for label in labels]
    pairs = [_bit_equality(pair, modes) for pair in _pairs(labels, expect_equal, modes)]
    equivalences = [Equivalence(a, b, _judge(b, modes[b], modes[a], found)[0]) for a, b in expect_equivalent]
    return replace(found, modes=rows, pairs=pairs, equivalences=equivalences, covers=_covers(runs, rows, looks))


def _refuse_duplicates(runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.label, run.seed), run)
        if other is not run:
            raise UsageError(
                f"{printable(other.path)} and {printable(run.path)} are both {printable(run.label)} with seed "
                f"{run.seed}; leave one of them out"
            )


def _refuse_unknown(labels: list[str], name: str, given: Iterable[str]) -> None:
    for label in given:
        if label not in labels:
            known = printable(", ".join(labels))
            raise UsageError(f"{name}: no run of the mode {printable(label)!r}; there are {known}")


def _check_pairs(labels: list[str], name: str, pairs: Iterable[tuple[str, str]]) -> None:
    for pair in pairs:
        _refuse_unknown(labels, name, pair)
        if pair[0] == pair[1]:
            raise UsageError(f"{name} {printable(','.join(pair))}: a mode equals itself; give two modes")


def _summarize(
    label: str, runs: list[Run], failures: list[Failure], reference_runs: list[Run], found: Comparison
) -> ModeSummary:
    """Return the row of a mode; `found` has all of the comparison but its rows."""
    losses = end_losses(runs, reference_runs)
    diverged = any(run.status == "diverged" for run in runs)  # the mean of the others would hide that
    end_loss, test_loss = (None if diverged else _mean(of) for of in (losses, losses_on_test_data(runs)))
    test_difference = None
    if label == found.reference:
        sentence = _reference_sentence(label, end_loss, len(losses), short_unit(found.unit), found.end)
        verdict = Verdict("reference", sentence, len(losses))
    else:
        verdict, test_difference = _judge(label, runs, reference_runs, found)
    lost = {failure.seed for failure in failures} - {run.seed for run in runs}
    partner = {run.seed: run for run in reference_runs}
    firsts = [first_difference(partner[run.seed], run) for run in runs if run.seed in partner]
    results = [run.result for run in runs if run.result]
    speeds = [r["tokens_per_second"] for r in results if r["tokens_per_second"] is not None]
    applied = sum(sum(run.steps["applied"]) for run in runs)
    steps = sum(len(run.steps["step"]) for run in runs)
    return ModeSummary(
        label=label,
        runs=runs,
        failures=failures,
        status=", ".join(dict.fromkeys([run.status for run in runs] + ["failed" for _ in lost])),
        test_loss=test_loss,
        test_ppl=perplexity(test_loss) if found.has_perplexity and test_loss is not None else None,
        verdict=verdict,
        first_difference=min((first for first in firsts if first is not None), default=None),
        steps=steps,
        updates=applied,
        skipped=steps - applied,
        final_loss_scale=runs[0].steps["loss_scale"][-1] if runs else None,
        tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
        peak_memory_bytes=max((r["peak_memory_bytes"] for r in results if r["peak_memory_bytes"]), default=None),
        end_loss=end_loss,
        test_difference=test_difference,
    )


def _judge(
    label: str, runs: list[Run], reference_runs: list[Run], found: Comparison
) -> tuple[Verdict, Difference | None]:
    """Return the verdict on a mode, and the difference of its test losses."""
    tested, reference_tested = losses_on_test_data(runs), losses_on_test_data(reference_runs)
    diverged = {run.seed for run in runs if run.status == "diverged"}
    diverged |= {s for s, loss in tested.items() if math.isfinite(reference_tested.get(s, loss)) > math.isfinite(loss)}
    losses, reference_losses = end_losses(runs, reference_runs), end_losses(reference_runs, runs)
    unit = short_unit(found.unit)
    verdict = judge(label, losses, reference_losses, found.margin, unit, found.end, diverged, found.looks)
    paired = paired_by_seed(tested, reference_tested, found.looks)
    if paired is None:
        return verdict, None
    beside = Difference(paired.n, paired.mean, interval(paired) if paired.n > 1 else None)
    return heed_test_loss(label, verdict, paired, found.margin, unit), beside


def _mean(losses: dict[int, float]) -> float | None:
    return sum(loss / len(losses) for loss in losses.values()) if losses else None


def _reference_sentence(label: str, loss: float | None, count: int, unit: str, figure: str) -> str:
    if loss is None:
        return f"{label} is the reference, of which no finished run has a {figure}."
    size = f"{loss:.4f} {unit}".rstrip()
    return f"{label} is the reference: {figure} {size}, mean of {count} seed{'s' if count > 1 else ''}."


def first_difference(first: Run, second: Run) -> int | None:
    """Return the first step that both runs have with losses that differ in a bit; nan equals nan."""
    return next((step for step, mine, other in _side_by_side(first, second) if not _same(mine, other)), None)


def _side_by_side(first: Run, second: Run) -> Iterable[tuple[int, float, float]]:
    """Return each step that both runs have, with the losses of both, in ascending order."""
    if first.steps["step"] == second.steps["step"]:  # most runs; without a dict of a million steps
        return zip(first.steps["step"], first.steps["loss"], second.steps["loss"], strict=True)
    a, b = losses_by_step(first), losses_by_step(second)
    return ((step, loss, b[step]) for step, loss in a.items() if step in b)


def losses_by_step(run: Run) -> dict[int, float]:
    """Return step -> training loss, in ascending order."""
    return dict(zip(run.steps["step"], run.steps["loss"], strict=True))


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


def _pairs(
    labels: list[str], expect_equal: Sequence[tuple[str, str]], modes: dict[str, list[Run]]
) -> list[tuple[str, str, bool]]:
    """Return the pairs to report, each with whether it must agree by design."""
    designed: dict[frozenset[str], tuple[str, str]] = {}
    for label in labels:
        for pair in combinations(_equals(label, modes), 2):
            if _must_agree(modes[pair[0]], modes[pair[1]]):
                designed.setdefault(frozenset(pair), pair)
    given = {frozenset(pair): pair for pair in expect_equal}
    pairs = given | {key: pair for key, pair in designed.items() if key not in given}
    return [(*pair, key in designed) for key, pair in pairs.items()]


def _equals(label: str, modes: dict[str, list[Run]]) -> list[str]:
    """Return `label` and those of `modes` that it names as equal, in the order in which it names them."""
    named = modes[label][0].equals if modes[label] else []
    return list(dict.fromkeys(name for name in (named if label in named else [label, *named]) if name in modes))


def _must_agree(first: list[Run], second: list[Run]) -> bool:
    """Return whether each mode names the other, with the same job, the same machine and exact loss scales."""
    runs = first + second
    named = all(b.label in a.equals and a.label in b.equals for a in first for b in second)
    scales = {_loss_scales(run) for run in runs}
    exact = all(scale and 0 < scale < math.inf and math.frexp(scale)[0] == 0.5 for scale, _ in scales)
    same = len(scales) == 1 or all(run.dtype in WIDE for run in runs)
    return bool(first and second) and named and exact and same and len({_deciding(run) for run in runs}) == 1


def _loss_scales(run: Run) -> tuple[float | None, int | None]:
    """Return the static loss scale, or where a dynamic one starts and its window; None for what is not known."""
    if run.loss_scale is not None:
        return run.loss_scale, None
    precision = run.config["precision"]
    return precision.get("init_scale"), precision.get("scale_window")


def _deciding(run: Run) -> str:
    """Return what decides the bits of a step besides the precision, as one text."""
    environment = run.config["environment"]
    job = {name: value for name, value in run.job.items() if name not in run.length}
    others = {"tf32": False, "processes": 1, "accumulate": 1}
    more = {name: environment.get(name, otherwise) for name, otherwise in others.items()}
    return canonical([job, machine(run.config), more])


def _parted_rates(rows: list[ModeSummary]) -> Iterator[str]:
    """Yield a line for each mode whose learning rate starts as the reference's with a seed, and parts from it later."""
    partners = {run.seed: run.steps["lr"] for run in rows[0].runs}
    for row in rows[1:]:
        rates = [(run.seed, run.steps["lr"], partners[run.seed]) for run in row.runs if run.seed in partners]
        parted = [
            str(seed)
            for seed, mine, other in rates
            if mine[0] == other[0] and not all(map(_same, mine, other))  # the shorter one ends it
        ]
        if parted:
            seeds = f"seed{'s' if len(parted) > 1 else ''} {', '.join(parted)}"
            yield (
                f"The learning rate of {row.label} parts from the reference's with {seeds}, as where a schedule "
                "follows the validation. The difference of the losses is then that of the learning rates too. A "
                "schedule of the steps alone takes this noise away."
            )


def _machines(runs: Sequence[Run]) -> set[tuple[tuple[str, str], ...]]:
    return {tuple(machine(run.config).items()) for run in runs}


def _bit_equality(pair: tuple[str, str, bool], modes: dict[str, list[Run]]) -> BitEquality:
    first, second, expected = pair
    a, b = ({run.seed: run for run in modes[label]} for label in (first, second))
    steps = 0
    different, unequal = [], []
    for seed in sorted(a.keys() & b.keys()):
        both = list(_side_by_side(a[seed], b[seed]))
        steps += len(both)
        found = next((row for row in both if not _same(row[1], row[2])), None)
        if found is not None:
            different.append((found[0], seed, *found[1:]))
        mine, other = a[seed].steps["step"], b[seed].steps["step"]
        if mine != other:
            unequal.append(f"with seed {seed} {first} has {len(mine)} steps and {second} {len(other)}")
    alone = sorted(a.keys() ^ b.keys())
    unequal += [f"seed {seed} has a run of {first if seed in a else second} only" for seed in alone]
    if different:
        step, seed, loss, other_loss = min(different)
        sentence = f"differ first at step {step} (seed {seed}): {loss!r} in {first}, {other_loss!r} in {second}"
        sentence += ". They must agree by design" if expected else ""
    elif steps == 0:
        sentence = "not compared: no seed has a run of both"
    elif unequal:
        sentence = f"bit-equal in the {steps} steps that both have, but {'; '.join(unequal)}"
    else:
        sentence = f"bit-equal for all {steps} steps"
    equal = steps > 0 and not different and not unequal
    return BitEquality(first, second, expected, steps, equal, f"{first} and {second}: {sentence}.")


def _covers(runs: Sequence[Run], rows: list[ModeSummary], looks: int) -> list[str]:
    lines = [
        "An interval covers the variation between seeds, which is that of the initial weights and the dropout masks, "
        "in this job as it was run.",
        "It does not cover other data or another order of the batches, other sizes, learning rates or lengths of "
        "training, or other hardware.",
        "A pair of runs with one seed starts alike and sees the same batches, but training soon amplifies a "
        "difference in one bit: a step at which losses differ is no sign of a worse mode.",
        "The verdict compares the mean training loss over the second half of a run's steps. How a model does on data "
        "that it was not trained on, only a test loss shows.",
    ]
    lines += _parted_rates(rows)
    judged = sum(row.verdict.p_equivalence is not None for row in rows)
    if judged > 1:
        lines.append(f"Each of the {judged} verdicts has its own 5% risk of error; together the risk is larger.")
    if looks > 1:
        lines.append(
            f"Seeds were added until every mode was decided, with {looks} planned looks at most. Each look has "
            f"{5 / looks:.3g}% of the risk of 5%, so intervals are wider, and p-values {looks} times as large."
        )
    if len(_machines(runs)) > 1:
        lines.append("The runs differ in device, torch, cuDNN or threads, which alone can change bits.")
    return lines
