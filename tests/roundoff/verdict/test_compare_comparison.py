"""Runs side by side: what is refused, who is the reference, and which losses are equal in every bit."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from programs import ROOT
from roundoff.errors import UsageError
from roundoff.report.summary import table, unfinished
from roundoff.runs.reading import Run, read_run
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.types import Comparison, Difference, Failure
from synthetic import LOSSES, SEEDS, change_json, make_config, make_run, make_runs

OTHER = [*LOSSES[:4], math.nextafter(LOSSES[4], 9), *LOSSES[5:]]
"""One bit differs at step 5."""
EARLY = [*LOSSES[:2], 1.0, *LOSSES[3:]]
"""Step 3 differs."""


class Runs:
    """Makes runs in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __call__(self, label: str = "fp32", seed: int = 1111, losses: Any = None, **rest: Any) -> Run:
        self.count += 1
        return read_run(make_run(self.folder / f"{label}-{seed}-{self.count}", label, seed, losses, **rest))

    def scaled(self, *runs: tuple[str, float | None, int]) -> list[Run]:
        """Runs of these modes, loss scales and seeds."""
        return [self(label, seed, loss_scales=[1.0] * 8, precision={"loss_scale": s}) for label, s, seed in runs]


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def refusal(runs: list[Run], *rest: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        compare_runs(runs, *rest, **options)
    assert str(error.value).isprintable()
    return str(error.value)


def labels(comparison: Comparison) -> list[str]:
    return [mode.label for mode in comparison.modes]


def words(comparison: Comparison) -> list[str]:
    return [mode.verdict.word for mode in comparison.modes]


def pairs(runs: list[Run], *rest: Any, **options: Any) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in compare_runs(runs, *rest, **options).pairs]


def failure(label: str, seed: int = 1111) -> Failure:
    return Failure(label, seed, ["main.py"], 1, "error: out of memory")


def test_the_reference_comes_first_and_is_fp32_unless_asked(run) -> None:
    runs = [run(label) for label in ("amp-fp16", "manual", "fp32")]
    assert labels(compare_runs(runs)) == ["fp32", "amp-fp16", "manual"]
    assert labels(compare_runs(runs[:2])) == ["amp-fp16", "manual"]
    seen = compare_runs(runs, reference="manual")
    assert (seen.reference, labels(seen)) == ("manual", ["manual", "amp-fp16", "fp32"])
    assert words(seen) == ["reference", "described", "described"]
    said = "manual is the reference: training loss of the second half 5.1250 nats, mean of 1 seed."
    assert seen.modes[0].verdict.sentence == said


def test_failures(run) -> None:
    """A mode that left no run is shown, and is the reference only where it is asked for."""
    runs = [run("manual"), run("amp-fp16")]
    seen = compare_runs(runs, [failure("fp32")])
    assert labels(seen) == ["manual", "amp-fp16", "fp32"]
    assert (seen.modes[2].status, seen.modes[2].verdict.word, seen.modes[2].steps) == ("failed", "not finished", 0)
    asked = compare_runs(runs, [failure("fp32")], reference="fp32")
    assert words(asked) == ["reference", "not finished", "not finished"]
    alone = compare_runs([], [failure("manual"), failure("fp32")])
    assert [(mode.status, mode.final_loss_scale) for mode in alone.modes] == [("failed", None)] * 2


def test_what_is_refused(run) -> None:
    runs = [run(), run("manual")]
    assert refusal([]) == "no runs to compare; give at least one run directory"
    twice = f"{runs[0].path} and {runs[0].path} are both fp32 with seed 1111; leave one of them out"
    again = [*runs[:2], replace(runs[0])]
    assert refusal(again) == refusal(again, anyway=True) == twice
    known = "there are fp32, manual"
    assert refusal(runs, reference="x\n") == f"reference: no run of the mode 'x\\\\n'; {known}"
    assert refusal(runs, expect_equal=[("fp32", "y")]) == f"expect_equal: no run of the mode 'y'; {known}"
    assert "a mode equals itself" in refusal(runs, expect_equal=[("fp32", "fp32")])


A, B, C = ({"name": "A"}, {"name": "B"}, {"name": "C", "more": {"a": [1, 2]}})
JOBS: dict[str, tuple[Any, Any, list[str]]] = {
    "every field": (
        {"model": "GRU", "tied": True, "lr": 5.0, "clip": math.inf, "epochs": 3, "max_steps": 9, "dry_run": True},
        {},
        [
            'model is "GRU" in A, "LSTM" in B', "tied is true in A, false in B", "lr is 5.0 in A, 20.0 in B",
            'clip is "inf" in A, 0.25 in B', "epochs is 3 in A, 2 in B", "max_steps is 9 in A, null in B",
            "dry_run is true in A, false in B",
        ],
    ),
    "a corpus": (
        {"corpus": {"sha256": {"train": "aa" * 31 + "ab"}, "words": 3}},
        {},
        [f'corpus.sha256.train is "{"a" * 20}… in A, "{"a" * 20}… in B', "corpus.words is 3 in A, 2186 in B"],
    ),
    "a field that one lacks": ({"warmup": 10}, {}, ["warmup is 10 in A, not there in B"]),
    "null is not missing": ({"warmup": None}, {}, ["warmup is null in A, not there in B"]),
    "a text is not missing": ({"warmup": "not there"}, {}, ['warmup is "not there" in A, not there in B']),
    "a text is no number": ({"x": "1"}, {"x": 1}, ['x is "1" in A, 1 in B']),
    "a mapping beside a text": ({"corpus": "x"}, {}, ['corpus is "x" in A, {"name": "corpus", "s… in B']),
    "deep and in a list": (
        {"x": {"y": {"z": [1, {"a": 2}]}}},
        {"x": {"y": {"z": [1, {"a": 3}]}}},
        ['x.y.z is [1, {"a": 2}] in A, [1, {"a": 3}] in B'],
    ),
    "true is not 1": ({"x": True}, {"x": 1}, ["x is true in A, 1 in B"]),
    "20 is 20.0": ({"lr": 20}, {"lr": 20.0}, []),
    "nan is nan": ({"x": math.nan}, {"x": "nan"}, []),
    "order means nothing": ({"x": {"a": 1, "b": 2}}, {"x": {"b": 2, "a": 1}}, []),
    "harm": ({"a\n\x1b[31m": "x\r\n" * 100}, {}, [r'a\n\x1b[31m is "x\r\nx\r\nx\r\nx\r\n… in A, not there in B']),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBS)
def test_another_job_is_refused(run, case: str) -> None:
    ours, theirs, expected = JOBS[case]
    runs = [run(job=ours), run("manual", job=theirs)]
    seen = compare_runs(runs, anyway=True).differences
    assert [line.replace(str(runs[0].path), "A").replace(str(runs[1].path), "B") for line in seen] == expected
    if expected:
        said = f"these runs do not train the same job: {'; '.join(seen)}; leave some out, or give anyway=True"
        assert refusal(runs) == said


def test_a_job_is_any_mapping(tmp_path: Path) -> None:
    """Nothing of a language model is asked for: two modes of another program that name each other."""
    paths = []
    for mode, other in (("a", "b"), ("b", "a")):
        paths.append(make_run(tmp_path / mode, mode, seed=3, precision={"equals": [other]}))
        config = {"job": {"model": "cnn"}, "precision": {"mode": mode, "equals": [other], "loss_scale": 2}, "seed": 3}
        (paths[-1] / "config.json").write_text(str(config | {"environment": {}}).replace("'", '"'))
    seen = compare_runs([read_run(str(path)) for path in paths])
    assert (labels(seen), seen.differences) == (["a", "b"], [])
    assert [(pair.first, pair.second, pair.expected) for pair in seen.pairs] == [("a", "b", True)]


def test_long_lists_are_cut(run) -> None:
    runs = [run(seed=seed) for seed in SEEDS] + [run("manual", seed, job={"bptt": 1}) for seed in SEEDS]
    assert " and 2 more" in refusal(runs)
    many = compare_runs([run(job={str(i): 1 for i in range(5000)}), run("manual")], anyway=True).differences
    assert (len(many), many[-1]) == (21, "4980 more fields of the job differ")


def test_other_options_and_machines_are_not_another_job(run) -> None:
    environment = {"torch": "2.6.0", "threads": 8, "device": "A GPU"}
    seen = compare_runs([run(), run("manual", environment=environment, options={"log_interval": 5})])
    assert seen.differences == []
    assert seen.covers[-1] == "The runs differ in device, torch, cuDNN or threads, which alone can change bits."


def test_other_seeds_are_refused(run) -> None:
    runs = [run(), run(seed=1112), run("manual")]
    assert "seed is 1111, 1112 in fp32 but 1111 in manual" in refusal(runs)
    assert compare_runs(runs, [failure("manual", 1112)]).differences == []
    assert compare_runs(runs, anyway=True).modes[1].verdict.pairs == 1


def test_figures_of_a_mode(run) -> None:
    runs = [run(seed=1111 + i, test_loss=loss) for i, loss in enumerate([5.0, 5.5, 6.0])]
    scales, taken = [65536.0] * 2 + [32768.0] * 6, [True, False] + [True] * 6
    runs += [
        run("amp-fp16", 1112, test_loss=5.5, loss_scales=[8.0] * 8, peak_memory_bytes=7),
        run("amp-fp16", 1111, OTHER, test_loss=5.25, loss_scales=scales, applied=taken, tokens_per_second=500.0),
        run("amp-fp16", 1113, LOSSES[:3], test_loss=9.0, status="interrupted", tokens_per_second=None),
    ]
    mode = compare_runs(runs).modes[1]
    assert [r.seed for r in mode.runs] == [1111, 1112, 1113]
    assert mode.status == "finished, interrupted"
    assert mode.test_loss == 5.375  # an interrupted run's test loss is of another length of training
    assert mode.test_ppl == pytest.approx(math.exp(5.375), rel=1e-15)
    assert (mode.steps, mode.updates, mode.skipped) == (19, 18, 1)
    assert (mode.final_loss_scale, mode.tokens_per_second, mode.peak_memory_bytes) == (32768.0, 750.0, 400_000_000)
    assert (mode.verdict.word, mode.verdict.pairs, mode.verdict.difference) == ("described", 2, pytest.approx(0))
    half = 0.125 * math.tan(0.475 * math.pi)  # of 0.25 and 0
    assert mode.test_difference == Difference(2, 0.125, pytest.approx((0.125 - half, 0.125 + half)))  # type: ignore[arg-type]
    assert mode.first_difference == 5


@pytest.mark.parametrize("status", [None, "interrupted", "diverged"])
def test_unfinished_runs_have_no_test_loss(run, status: str | None) -> None:
    mode = compare_runs([run(), run("manual", status=status)]).modes[1]
    assert mode.status == (status or "unfinished")
    word = "diverged" if status == "diverged" else "not finished"
    assert (mode.test_loss, mode.test_ppl, mode.verdict.word) == (None, None, word)


def test_a_seed_that_diverged_is_counted_once_and_no_mean_hides_it(run) -> None:
    runs = [run(label, seed, test_loss=5.5) for label in ("fp32", "manual") for seed in (1, 2, 3)]
    runs += [run("fp32", 4), run("manual", 4, status="diverged", test_loss=None)]
    failed = Failure("manual", 4, ["main.py"], 1, "diverged at step 7")
    seen = compare_runs(runs, [failed])
    manual = seen.modes[1]
    assert (manual.verdict.word, manual.test_loss, manual.status) == ("diverged", None, "finished, diverged")
    assert manual.verdict.sentence.startswith("manual diverged with seed 4, and the reference did not.")
    (line,) = unfinished(seen.modes)
    assert line == f"manual with seed 4: diverged after step 8 ({runs[-1].path}): diverged at step 7"


SETTINGS = {
    "init_scale": ("precision", [1024.0, 65536.0], "manual: init_scale is 1024.0 in"),
    "scale_window": ("precision", [2000, 1000], "manual: scale_window is 2000 in"),
    "fp16_utils": ("precision", ["own", "apex"], 'manual: fp16_utils is "own" in'),
    "processes": ("environment", [1, 2], "processes is 1 in"),
    "tf32": ("environment", [False, True], "tf32 is false in"),
    "deterministic": ("environment", [False, True], "deterministic is false in"),
    "accumulate": ("environment", [1, 2], "accumulate is 1 in"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_runs_of_other_settings_are_not_pooled(run, name: str) -> None:
    """Nor are those told apart that do not say the setting, as older ones."""
    part, values, said = SETTINGS[name]
    config = make_config("manual", 1)[part]
    runs = [run("fp32", seed) for seed in (1, 2)]
    others = [run("manual", seed, **{part: config | {name: value}}) for seed, value in zip((1, 2), values, strict=True)]
    assert said in refusal(runs + others)
    assert compare_runs(runs + others, anyway=True).differences
    same = [run("manual", seed, **{part: config | {name: values[0]}}) for seed in (1, 2)]
    assert words(compare_runs(runs + same)) == ["reference", "described"]


def test_a_run_that_does_not_say_its_parts_had_one_for_each_batch(run) -> None:
    """As runs had before a batch could have several."""
    environment = make_config("manual", 1)["environment"]
    one, two = (run("manual", environment=environment | {"accumulate": n}) for n in (1, 2))
    assert compare_runs([run(), one]).differences == []
    assert "accumulate is 1 in" in refusal([run(), two])


def test_a_finished_run_may_have_no_test_loss(run) -> None:
    seen = compare_runs([run(test_loss=None), run("manual")])
    assert (seen.has_test_loss, seen.modes[1].verdict.pairs, seen.modes[1].test_difference) == (True, 1, None)
    assert not compare_runs([run(test_loss=None), run("manual", test_loss=None)]).has_test_loss
    unfinished = compare_runs([run(status=None), run("manual")])
    said = "fp32 is the reference, of which no finished run has a training loss of the second half."
    assert unfinished.modes[0].verdict.sentence == said
    assert (
        "Not counted: seed 1111, which has a training loss of the second half in one"
        in unfinished.modes[1].verdict.sentence
    )


def test_a_loss_scale_that_no_run_says_is_that_of_its_steps(run, tmp_path: Path) -> None:
    """Runs of two fixed scales are two modes. Where the scale moved in one run, it may have moved in the others."""
    silent = {"precision": {"mode": "mine"}}
    fixed = [run("mine", 1111 + i, loss_scales=[scale] * 8) for i, scale in enumerate((128.0, 64.0, 2.0**20))]
    moved = run("mine", 1114, loss_scales=[4.0] * 7 + [2.0])
    for one in (*fixed, moved):
        change_json(one.path / "config.json", **silent)
    again = [read_run(one.path) for one in (*fixed, moved)]
    assert [one.loss_scale for one in again] == [128.0, 64.0, 2.0**20, None]
    assert labels(compare_runs(again[:2], anyway=True)) == ["mine-scale-128", "mine-scale-64"]
    assert labels(compare_runs(again)) == ["mine"]


def test_verdicts_are_paired_by_seed_and_take_the_margin(tmp_path: Path) -> None:
    paths = make_runs(tmp_path, "fp32", [5.0, 6.0, 7.0]) + make_runs(tmp_path, "manual", [5.02, 6.021, 7.019])
    runs = [read_run(path) for path in paths]
    for options, word in (({}, "worse"), ({"margin": 0.03}, "equivalent"), ({"reference": "manual"}, "better")):
        assert compare_runs(runs[::-1], **{"reference": "fp32"} | options).modes[1].verdict.word == word


def test_what_the_intervals_cover(run) -> None:
    lines = compare_runs([run(), run("manual")]).covers
    assert len(lines) == 4
    assert "covers the variation between seeds" in lines[0]
    assert "does not cover other data" in lines[1]
    assert "mean training loss over the second half" in lines[3]
    three = [run(label, seed, test_loss=seed / 200) for label in ("a", "b", "c") for seed in SEEDS[:3]]
    assert "Each of the 2 verdicts has its own 5% risk" in compare_runs(three).covers[4]


def test_first_difference_is_the_least_over_seeds(run) -> None:
    runs = [run(seed=seed) for seed in SEEDS[:2]]
    runs += [run("manual", 1111, OTHER), run("manual", 1112, EARLY)]
    runs += [run("amp-fp16", seed, LOSSES[:6]) for seed in SEEDS[:2]]
    assert [mode.first_difference for mode in compare_runs(runs).modes] == [None, 3, None]


FP32 = ("fp32", "fp16-optimizer-fp32", "amp-fp32")


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (["fp32", "manual", "amp-fp16", "amp-bf16", "fp16-optimizer-dynamic"], []),
        (["fp16-optimizer", "manual"], [("manual", "fp16-optimizer")]),
        (["amp-fp32", "fp16-optimizer-fp32"], [FP32[1:]]),
        (["fp32", "amp-fp32", "fp16-optimizer-fp32"], [FP32[:2], FP32[::2], FP32[1:]]),
    ],
)
def test_modes_that_name_each_other_must_agree(run, modes: list[str], expected: list[tuple[str, str]]) -> None:
    seen = compare_runs([run(mode) for mode in modes]).pairs
    assert [(pair.first, pair.second) for pair in seen] == expected
    assert all(pair.expected and pair.equal and pair.steps == 8 for pair in seen)


HALF = ("manual", "fp16-optimizer")
BFLOAT = {"dtype": "bfloat16"}
MUST = {
    "one scale": (HALF, {}, {}, True),
    "an exact fraction": (HALF, {"loss_scale": 2.0**-3}, {"loss_scale": 2.0**-3}, True),
    "two scales in half": (HALF, {}, {"loss_scale": 256.0}, False),
    "no power of two": (HALF, {"loss_scale": 1000.0}, {"loss_scale": 1000.0}, False),
    "a dynamic scale": (HALF, {}, {"loss_scale": None}, False),
    "an endless scale": (HALF, {"loss_scale": math.inf}, {"loss_scale": math.inf}, False),
    "a scale of 0": (HALF, {"loss_scale": 0.0}, {"loss_scale": 0.0}, False),
    "two scales in fp32": (FP32[:2], {}, {"loss_scale": 1024.0}, True),
    "no power of two in fp32": (FP32[:2], {}, {"loss_scale": 1000.0}, False),
    "two scales in bf16": (FP32[:2], BFLOAT, BFLOAT | {"loss_scale": 1024.0}, False),
    "two scales in fp32 and bf16": (FP32[:2], {}, BFLOAT | {"loss_scale": 1024.0}, False),
    "two scales in an unknown dtype": (FP32[:2], {"dtype": None}, {"dtype": None, "loss_scale": 2}, False),
    "one names the other": (FP32[:2], {"equals": []}, {}, False),
    "the other names one": (FP32[:2], {}, {"equals": []}, False),
}


@pytest.mark.parametrize("case", MUST)
def test_when_loss_scales_let_modes_agree(run, case: str) -> None:
    modes, ours, theirs, expected = MUST[case]
    runs = [run(mode, loss_scales=[1.0] * 8, precision=p) for mode, p in zip(modes, (ours, theirs), strict=True)]
    assert pairs(runs) == ([modes] if expected else [])
    (asked,) = compare_runs(runs, expect_equal=[modes]).pairs
    assert (asked.expected, asked.equal) == (expected, True)


@pytest.mark.parametrize(
    "other",
    [
        {"environment": {"device": "B"}}, {"environment": {"torch": "2.6.0"}}, {"environment": {"threads": 3}},
        {"environment": {"cudnn": "91002"}}, {"environment": {"tf32": True}}, {"environment": {"processes": 2}},
        {"environment": {"accumulate": 2}},
        {"job": {"lr": 5.0}}, {"job": {"corpus": {"sha256": {"valid": "ff" * 32}}}},
    ],
)  # fmt: skip
def test_other_machines_and_jobs_need_not_agree(run, other: dict[str, Any]) -> None:
    assert pairs([run(), run("amp-fp32", **other)], anyway=True) == []


def test_a_longer_run_must_agree_as_far_as_the_other_goes(run) -> None:
    longer = {"epochs": 4, "max_steps": 9, "dry_run": True}
    (pair,) = compare_runs([run(job=longer), run("amp-fp32", 1111, LOSSES[:5])], anyway=True).pairs
    assert (pair.expected, pair.steps) == (True, 5)


def test_asked_pairs_come_first_and_once(run) -> None:
    runs = [run(mode) for mode in ("fp32", "amp-fp32", *HALF)]
    seen = compare_runs(runs, expect_equal=[("manual", "fp32"), ("fp16-optimizer", "manual"), ("fp32", "manual")]).pairs
    assert [(pair.first, pair.second, pair.expected) for pair in seen] == [
        ("fp32", "manual", False),
        ("fp16-optimizer", "manual", True),
        ("fp32", "amp-fp32", True),
    ]


NOTHING = [6.0, math.nan, math.inf]
BOTH = "bit-equal in the {} steps that both have, but "
SENTENCES: dict[str, tuple[list[Any], list[Any], int, bool, str]] = {
    "equal": ([LOSSES], [LOSSES], 8, True, "bit-equal for all 8 steps."),
    "nan equals nan": ([NOTHING], [NOTHING], 3, True, "bit-equal for all 3 steps."),
    "a bit": (
        [LOSSES, LOSSES], [LOSSES, OTHER], 16, False,
        "differ first at step 5 (seed 1112): 5.5 in manual, 5.500000000000001 in fp16-optimizer. "
        "They must agree by design.",
    ),
    "the first step over all seeds": (
        [LOSSES] * 3, [OTHER, EARLY, OTHER], 24, False,
        "differ first at step 3 (seed 1112): 6.0 in manual, 1.0 in fp16-optimizer. They must agree by design.",
    ),
    "another length": (
        [LOSSES], [LOSSES[:6]], 6, False,
        BOTH.format(6) + "with seed 1111 manual has 8 steps and fp16-optimizer 6.",
    ),
    "a seed of one": (
        [LOSSES, LOSSES], [LOSSES], 8, False, BOTH.format(8) + "seed 1112 has a run of manual only.",
    ),
    "no seed of both": ([LOSSES], [], 0, False, "not compared: no seed has a run of both."),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_what_is_said_of_a_pair(run, case: str) -> None:
    ours, theirs, steps, equal, sentence = SENTENCES[case]
    runs = [run("manual", seed, losses) for seed, losses in zip(SEEDS, ours, strict=False)]
    runs += [run("fp16-optimizer", seed, losses) for seed, losses in zip(SEEDS, theirs, strict=False)]
    failures = [failure("fp16-optimizer", seed) for seed in SEEDS[len(theirs) : len(ours)]]
    (pair,) = compare_runs(runs, failures, expect_equal=[] if theirs else [HALF]).pairs
    assert (pair.steps, pair.equal, pair.sentence) == (steps, equal, f"manual and fp16-optimizer: {sentence}")


def test_each_loss_scale_is_a_mode_with_its_seeds(run) -> None:
    runs = [("manual", scale, seed) for scale in (1.0, 128.0, 0.1, 2.0**-8, 2.0**17) for seed in (1, 2)]
    seen = compare_runs(run.scaled(("fp32", 1.0, 1), ("fp32", 1.0, 2), *runs))
    names = ("fp32", *(f"manual-scale-{scale}" for scale in ("1", "128", "0.1", "2^-8", "2^17")))
    assert {mode.label: [r.seed for r in mode.runs] for mode in seen.modes} == {name: [1, 2] for name in names}
    assert all(mode.verdict.pairs == 2 for mode in seen.modes)
    assert "manual-scale-0.1" in table(seen)
    both = compare_runs(run.scaled(("amp-fp16", None, 1), ("amp-fp16", 1024.0, 1)), reference="amp-fp16-scale-1024")
    assert labels(both) == ["amp-fp16-scale-1024", "amp-fp16-dynamic"]
    one = run.scaled(("manual", 1.0, 1), ("manual", 1.0, 2), ("amp-fp16", None, 1), ("amp-fp16", None, 2))
    assert labels(compare_runs(one)) == ["manual", "amp-fp16"]
    twice = run.scaled(("manual", 1.0, 1), ("manual", 1.0, 1), ("manual", 2.0, 1))
    assert [label.rpartition("-")[0] for label in labels(compare_runs(twice, anyway=True))] == [
        "manual-scale-1 manual-1",
        "manual-scale-1 manual-1",
        "manual-scale",
    ]


def test_reading_and_comparing_need_no_torch_and_judging_names_its_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from roundoff import compare_runs, read_run\n"
        "runs = [read_run(path) for path in sys.argv[1:]]\n"
        "assert compare_runs(runs[::2]).pairs[0].equal and not {'torch', 'numpy'} & set(sys.modules)\n"
        "try: compare_runs(runs)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    paths = [make_run(tmp_path / f"{label}-{seed}", label, seed) for label in FP32[:2] for seed in (1, 2)]
    command = [sys.executable, "-W", "error", "-c", code, *map(str, paths)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", "UsageError scipy is not installed: pip install 'roundoff[report]'\n")


def test_every_field_of_a_job_counts(run) -> None:
    for name, value in make_config()["job"].items():
        other = {"another": 1} if isinstance(value, dict) else 7.5
        (line,) = compare_runs([run(), run("manual", job={name: other})], anyway=True).differences
        assert line.startswith(name)


def test_names_say_what_is_meant(run) -> None:
    """Groups that have names may train other jobs, which is listed; runs of one name, and those of none, may not."""
    slow, fast = ([run("fp32", seed, job={"lr": lr}) for seed in (1, 2)] for lr in (5.0, 20.0))
    seen = compare_runs({"slow": slow, "fast": fast})
    assert [(mode.label, [r.seed for r in mode.runs]) for mode in seen.modes] == [("slow", [1, 2]), ("fast", [1, 2])]
    assert [line.partition(" is ")[0] for line in seen.differences] == ["lr"]
    assert (seen.pairs, words(seen)) == ([], ["reference", "described"])
    assert labels(compare_runs({"gpu": run("fp32", environment={"tf32": True}), "cpu": run()})) == ["gpu", "cpu"]
    assert "lr is 5.0 in" in refusal({"mixed": [slow[0], fast[1]], "fast": fast})  # type: ignore[arg-type]
    assert "are both all with seed 1" in refusal({"all": [*slow, *fast]})  # type: ignore[arg-type]
    other = [replace(each, label="bf16") for each in fast]
    assert "lr is 5.0 in" in refusal([*slow, *other])
    named = [replace(each, label="mine", named=True) for each in fast]
    assert labels(compare_runs([*slow, *named])) == ["fp32", "mine"]
    data = run("fp32", 1, job={"corpus": {"words": 3}})
    assert "corpus.words is 2186 in" in refusal({"before": slow[0], "after": data})  # type: ignore[arg-type]
    assert "loss_unit is" in refusal({"before": slow[0], "after": run(seed=1, loss_unit="bits")})  # type: ignore[arg-type]
    assert "seed is 1, 2 in slow but 1 in fast" in refusal({"slow": slow, "fast": fast[0]})  # type: ignore[arg-type]


APART: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "a field of the job": ([{"job": {"lr": 5.0}}, {"job": {"lr": 20.0}}], ["fp32 lr=5", "fp32 lr=20"]),
    "two fields": (
        [{"job": {"model": "GRU", "nhid": 4}}, {"job": {"model": "LSTM"}}],
        ["fp32 model=GRU nhid=4", "fp32 model=LSTM nhid=8"],
    ),
    "a field deep in it, or not there": (
        [{"job": {"data_order": {"by": "length"}}}, {}], ["fp32 by=length", "fp32 no by"],
    ),
    "the job before the machine": (
        [{"job": {"lr": 5.0}, "environment": {"torch": "2.14"}}, {}], ["fp32 lr=5", "fp32 lr=20"],
    ),
    "two versions of torch": (
        [{"environment": {"torch": "2.6"}}, {"environment": {"torch": "2.14"}}], ["fp32 torch=2.6", "fp32 torch=2.14"],
    ),
    "two commits": (
        [{"environment": {"git_commit": "ab12"}}, {"environment": {"git_commit": "cd34"}}],
        ["fp32 commit=ab12", "fp32 commit=cd34"],
    ),
    "a setting of the precision": (
        [{"precision": {"scale_window": 9}}, {"precision": {"scale_window": 8}}],
        ["fp32 scale_window=9", "fp32 scale_window=8"],
    ),
    "harm": (
        [{"job": {"a\n": "\x1b[2J"}}, {}], [r"fp32 a\n=\x1b[2J", r"fp32 no a\n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_runs_of_one_mode_and_seed_are_called_by_what_differs(run, case: str) -> None:
    """With several seeds too, and beside another mode, which keeps its name."""
    changes, expected = APART[case]
    runs = [run("fp32", seed, **change) for change in changes for seed in (1, 2)]
    seen = compare_runs([*runs, *(run("manual", seed) for seed in (1, 2))])
    assert labels(seen) == [*expected, "manual"]
    assert [r.path for mode in seen.modes[:2] for r in mode.runs] == [r.path for r in runs]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (lambda when, seed: f"{when}/fp32-{seed}", ["fp32 before", "fp32 after"]),
        (lambda when, seed: f"{when}/runs/fp32-{seed}", ["fp32 before", "fp32 after"]),
        (lambda when, seed: f"{when}/{when}-{seed}", ["fp32 before", "fp32 after"]),  # seeds stay together
        (lambda when, seed: f"{when}-{seed}", ["fp32 before-1", "fp32 before-2", "fp32 after-1", "fp32 after-2"]),
    ],
)
def test_runs_that_do_not_differ_are_called_by_their_folder(
    tmp_path: Path, place: Callable[[str, int], str], expected: list[str]
) -> None:
    runs = [
        read_run(make_run(tmp_path / place(when, seed), seed=seed)) for when in ("before", "after") for seed in (1, 2)
    ]
    assert labels(compare_runs(runs, anyway=True)) == expected
