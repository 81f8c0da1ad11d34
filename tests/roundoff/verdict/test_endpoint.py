"""What verdicts compare: the training loss of the second half, over the same batches; and the test loss beside it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="this environment lacks scipy, of the extra report")

from roundoff.runs.reading import read_run
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.types import ModeSummary
from synthetic import ending, make_run

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
