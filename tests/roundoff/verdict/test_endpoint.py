"""What verdicts compare: the training loss of the second half, over the same batches; and the test loss beside it."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="this environment lacks scipy, of the extra report")

from roundoff.runs.reading import read_run
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.statistics import interval, p_equivalence, summarize
from roundoff.verdict.types import ModeSummary
from synthetic import ending, make_run, write_rows

INF, NAN = math.inf, math.nan
STEADY = [9.0] * 3
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[float, float] | None]] = {
    # reference, mode: losses and whether steps were applied; the end loss of each in their pair, None: "diverged"
    "the second half": ({"losses": [*STEADY, 1, 2, 3]}, {"losses": [*STEADY, 2, 3, 7]}, (2, 4)),
    "rounded down": ({"losses": [9, 9, 9, 9, 1, 2, 3]}, {"losses": [9, 9, 9, 9, 1, 2, 6]}, (2, 3)),
    "one step at least": ({"losses": [3]}, {"losses": [4]}, (3, 4)),
    "nothing before it counts": ({"losses": [*STEADY, 1, 2, 3]}, {"losses": [INF] * 2 + [9.0, 1, 2, 3]}, (2, 2)),
    "a skipped step has the loss of the weights that it left alone": (
        {"losses": [*STEADY, 1, 2, 3]}, {"losses": [*STEADY, 1, 8, 3], "applied": [True] * 4 + [False, True]}, (2, 4),
    ),
    "one that overflowed counts in neither": (
        {"losses": [*STEADY, 1, 2, 5]}, {"losses": [*STEADY, INF, 3, 5], "applied": [True] * 3 + [False] + [True] * 2},
        (3.5, 4),
    ),
    "nor where it is the reference's": (
        {"losses": [*STEADY, NAN, 3, 5], "applied": [True] * 3 + [False] + [True] * 2}, {"losses": [*STEADY, 1, 2, 5]},
        (4, 3.5),
    ),
    "an applied step that is not finite": ({"losses": [*STEADY, 1, 2, 5]}, {"losses": [*STEADY, 1, INF, 5]}, None),
    "inf of both signs": ({"losses": [*STEADY, 1, 2, 5]}, {"losses": [*STEADY, -INF, INF, 5]}, None),
    "no step that counts": (
        {"losses": [*STEADY, 1, 2, 5]}, {"losses": [*STEADY, NAN, NAN, NAN], "applied": [True] * 3 + [False] * 3}, None,
    ),
    "a test loss that is not finite": ({"losses": [3]}, {"losses": [3], "test_loss": INF}, None),
    "of the reference too": ({"losses": [3], "test_loss": NAN}, {"losses": [4], "test_loss": INF}, (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_the_loss_of_the_second_half(tmp_path: Path, case: str) -> None:
    *given, expected = ENDS[case]
    runs = [read_run(make_run(tmp_path / label, label, **g)) for label, g in zip(("fp32", "m"), given, strict=True)]
    verdict = compare_runs(runs).modes[1].verdict
    if expected is None:
        assert (verdict.word, verdict.difference) == ("diverged", pytest.approx(0) if "test" in case else None)
    else:
        assert (verdict.word, verdict.difference) == ("described", expected[1] - expected[0])


def test_runs_of_other_lengths_are_compared_at_the_end_of_each(tmp_path: Path) -> None:
    short = make_run(tmp_path / "a", losses=[9, 9, 1, 1], job={"max_steps": 4})
    long = make_run(tmp_path / "b", "m", losses=[9, 9, 2, 2, 1, 7, 3, 5])
    assert compare_runs([read_run(short), read_run(long)], anyway=True).modes[1].verdict.difference == 3


def test_learning_rates_that_part_are_told(tmp_path: Path) -> None:
    """Where a schedule has followed the validation of one run; not where the rates were others from the start on."""
    rates = {"fp32": [20.0] * 8, "same": [20.0] * 8, "parted": [20.0] * 5 + [5.0] * 3, "other": [19.0] * 8}
    runs = []
    for (label, lrs), seed in itertools.product(rates.items(), (1, 2, 3)):
        path = make_run(tmp_path / f"{label}-{seed}", label, seed)
        rows = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
        taken = rates["fp32"] if seed == 2 and label == "parted" else lrs
        write_rows(path / "steps.jsonl", [row | {"lr": lr} for row, lr in zip(rows, taken, strict=True)])
        runs.append(read_run(path))
    (line,) = (line for line in compare_runs(runs).covers if "learning rate of" in line)
    assert line.startswith("The learning rate of parted parts from the reference's with seeds 1, 3, as where")


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., ModeSummary]:
    def judge(ends: Sequence[float], tests: Sequence[float | None], **options: Any) -> ModeSummary:
        """A mode whose losses minus the reference's are those, at the end and on the test data."""
        runs = []
        for seed, (end, test) in enumerate(zip(ends, tests, strict=True)):
            runs.append(make_run(tmp_path / f"a{seed}", "fp32", seed, ending(4.0), 5.0))
            test = None if test is None else 5.0 + test
            runs.append(make_run(tmp_path / f"b{seed}", "m", seed, ending(4.0 + end), test))
        return compare_runs([read_run(run) for run in runs], **options).modes[1]

    return judge


SAME, WORSE, BETTER, NOISE = [0.001, -0.001, 0.0], [0.1, 0.11, 0.12], [-0.1, -0.11, -0.12], [0.1, -0.1, 0.05]
HEEDED: dict[str, tuple[list[float], list[float | None], str, str]] = {
    # differences at the end and on the test data, the word, and what its sentence says of the test data
    "both alike": (SAME, [*SAME], "equivalent", ""),
    "noise on the test data": (SAME, [*NOISE], "equivalent", ""),
    "worse on the test data alone": (SAME, [*WORSE], "worse", "m is worse than the reference on the test data; "),
    "better on the test data alone": (SAME, [*BETTER], "better", "m is better than the reference on the test data; "),
    # 0.05 with an error of 0.0046 or 0.0035; t(0.995, 2) is 9.92, and the margin 0.01.
    "likely worse on the test data": (SAME, [0.042, 0.05, 0.058], "equivalent", ""),
    "surely worse on the test data": (SAME, [0.044, 0.05, 0.056], "worse", "m is worse than the reference on the test"),
    "worse by less than the margin": (SAME, [0.001, 0.0011, 0.0012], "equivalent", ""),
    "worse in both": (WORSE, [*WORSE], "worse", ""),
    "in contradiction": (
        WORSE,
        [*BETTER],
        "worse",
        " On the test data it is better: test loss",
    ),
    "worse where training is undecided": (
        NOISE,
        [*WORSE],
        "undecided",
        " On the test data it is worse: test loss",
    ),
    "two seeds with a test loss": (SAME, [*WORSE[:2], None], "equivalent", ""),
    "none": (SAME, [None] * 3, "equivalent", ""),
}


@pytest.mark.parametrize("case", HEEDED)
def test_the_test_loss_is_shown_and_forbids_equivalence(judged, case: str) -> None:
    ends, tests, word, said = HEEDED[case]
    mode = judged(ends, tests)
    assert mode.verdict.word == word
    assert mode.verdict.difference == pytest.approx(sum(ends) / 3)
    assert said in mode.verdict.sentence
    assert ("test" in mode.verdict.sentence) == bool(said)
    known = [test for test in tests if test is not None]
    seen = mode.test_difference
    assert (seen and seen.pairs) == (len(known) or None)
    if seen is not None:
        assert seen.difference == pytest.approx(sum(known) / len(known))
        assert seen.interval is not None


RECORDED = {
    "fp32": [6.3046, 6.2995, 6.2957, 6.3027, 6.3073, 6.3251, 6.3211],
    "amp-bf16": [6.3016, 6.3006, 6.2973, 6.3031, 6.3166, 6.3098, 6.3145],
    "manual": [6.2939, 6.2944, 6.2938, 6.2962, 6.327, 6.3184, 6.3296],
}
"""Training loss of the second half, nats a word, in the job of docs/compare.md with seeds 1 to 7."""


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_verdicts_of_resampled_runs_are_as_rare_as_promised(seeds: int) -> None:
    """Pairs of runs drawn from the recorded ones, whose modes differ by nothing, or by exactly the margin.

    A run is drawn as what is left of it without the means of its mode and of its seed.
    """
    runs = np.array(list(RECORDED.values()))
    noise = runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()
    generator = np.random.default_rng(0)
    drawn = generator.choice(noise.flatten(), (1000, seeds)) - generator.choice(noise.flatten(), (1000, seeds))
    paired = [summarize([float(d) for d in row]) for row in drawn]
    missed = sum(low > 0 or high < 0 for low, high in map(interval, paired))
    assert 20 <= missed <= 70  # 50 at most expected, deviation 7
    margin = 4 * float(noise.std())  # else three seeds pass too seldom
    passed = sum(p_equivalence(one._replace(mean=one.mean + margin), margin) < 0.05 for one in paired)
    assert 20 <= passed <= 70
