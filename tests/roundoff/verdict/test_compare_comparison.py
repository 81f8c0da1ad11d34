"""Runs side by side: what is refused, who is the reference, and which losses are equal in every bit."""

import math
from pathlib import Path
from typing import Any

import pytest

from roundoff.errors import UsageError
from roundoff.runs.reading import Run, read_run
from roundoff.verdict.comparison import compare
from roundoff.verdict.types import Comparison, Failure
from synthetic import LOSSES, SEEDS, make_config, make_run, make_runs

OTHER = [*LOSSES[:4], math.nextafter(LOSSES[4], 9), *LOSSES[5:]]
"""One bit differs at step 5."""


def run(folder: Path, label: str, seed: int = 1111, *rest: Any, **config: Any) -> Run:
    return read_run(make_run(folder / f"{label}-{seed}-{len(list(folder.glob('*')))}", label, seed, *rest, **config))


def refusal(runs: list[Run], *rest: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        compare(runs, *rest, **options)
    text = str(error.value)
    assert text.isprintable()
    return text


def labels(comparison: Comparison) -> list[str]:
    return [mode.label for mode in comparison.modes]


def failure(label: str, seed: int = 1111) -> Failure:
    return Failure(label, seed, ["main.py"], 1, "error: out of memory")


def test_order_and_reference(tmp_path: Path) -> None:
    runs = [run(tmp_path, label) for label in ("amp-fp16", "manual", "fp32")]
    assert labels(compare(runs)) == ["fp32", "amp-fp16", "manual"]
    assert labels(compare(runs[:2])) == ["amp-fp16", "manual"]
    seen = compare(runs, reference="manual")
    assert (seen.reference, labels(seen)) == ("manual", ["manual", "amp-fp16", "fp32"])
    assert [mode.verdict.word for mode in seen.modes] == ["reference", "described", "described"]
    assert seen.modes[0].verdict.sentence == "manual is the reference: test loss 5.5000 nats, mean of 1 seed."


def test_a_failed_fp32_is_not_the_reference_unless_asked_for(tmp_path: Path) -> None:
    runs = [run(tmp_path, "manual"), run(tmp_path, "amp-fp16")]
    seen = compare(runs, [failure("fp32")])
    assert labels(seen) == ["manual", "amp-fp16", "fp32"]
    assert (seen.modes[2].status, seen.modes[2].verdict.word, seen.modes[2].steps) == ("failed", "not finished", 0)
    asked = compare(runs, [failure("fp32")], reference="fp32")
    assert [mode.verdict.word for mode in asked.modes] == ["reference", "not finished", "not finished"]


def test_only_failures(tmp_path: Path) -> None:
    seen = compare([], [failure("manual"), failure("fp32")])
    assert [mode.status for mode in seen.modes] == ["failed", "failed"]
    assert seen.modes[0].final_loss_scale is None


def test_nothing_to_compare() -> None:
    assert refusal([]) == "no runs to compare; give at least one run directory"


def test_unknown_labels(tmp_path: Path) -> None:
    runs = [run(tmp_path, "fp32"), run(tmp_path, "manual")]
    known = "there are fp32, manual"
    assert refusal(runs, reference="x\n") == f"--reference: no run of the mode 'x\\\\n'; {known}"
    assert refusal(runs, expect_equal=[("fp32", "y")]) == f"--expect-equal: no run of the mode 'y'; {known}"
    assert "a mode equals itself" in refusal(runs, expect_equal=[("fp32", "fp32")])


def test_duplicates_are_refused_even_anyway(tmp_path: Path) -> None:
    runs = [run(tmp_path, "fp32"), run(tmp_path, "manual"), run(tmp_path, "fp32")]
    text = f"{runs[0].path} and {runs[2].path} are both fp32 with seed 1111; leave one of them out"
    assert refusal(runs) == text
    assert refusal(runs, anyway=True) == text


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("model", "GRU", "LSTM"), ("emsize", 16, 8), ("nhid", 16, 8), ("nlayers", 1, 2), ("nhead", 4, 2),
        ("dropout", 0.5, 0.2), ("tied", True, False), ("batch_size", 40, 20), ("bptt", 70, 35),
        ("optimizer", "adamw", "sgd"), ("lr", 5.0, 20.0), ("clip", math.inf, 0.25), ("epochs", 3, 2),
        ("max_steps", 100, None), ("dry_run", True, False),
    ],
)  # fmt: skip
def test_another_job_is_refused(tmp_path: Path, field: str, value: Any, ours: Any) -> None:
    runs = [run(tmp_path, "fp32"), run(tmp_path, "manual", job={field: value}), run(tmp_path, "amp-fp16")]
    difference = f"{field} is {ours} in {runs[0].path}, {runs[2].path}, {value} in {runs[1].path}"
    assert refusal(runs) == (f"these runs do not train the same job: {difference}; leave some out, or add --anyway")
    assert compare(runs, anyway=True).differences == [difference]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_another_corpus_is_refused(tmp_path: Path, split: str) -> None:
    corpus = make_config()["job"]["corpus"]
    other = {"sha256": {split: "ff" * 32}}
    runs = [run(tmp_path, "fp32"), run(tmp_path, "manual", job={"corpus": other})]
    ours = corpus["sha256"][split][:19] + "…"
    text = f"corpus.sha256.{split} is {ours} in {runs[0].path}, {'f' * 19}… in {runs[1].path}"
    assert text in refusal(runs)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    corpus = {"vocab_size": 2188, "words": 2187}
    runs = [run(tmp_path, "fp32"), run(tmp_path, "manual", job={"corpus": corpus})]
    text = refusal(runs)
    assert f"corpus.words is 2186 in {runs[0].path}, 2187 in {runs[1].path}; corpus.vocab_size is 2192 in" in text


def test_other_flags_and_machines_are_not_another_job(tmp_path: Path) -> None:
    environment = {"torch": "2.6.0", "threads": 8}
    options = {"environment": environment | {"device": "A GPU"}, "options": {"log_interval": 5, "data": "b"}}
    runs = [run(tmp_path, "fp32"), run(tmp_path, "manual", **options)]
    seen = compare(runs)
    assert seen.differences == []
    assert seen.covers[-1] == "The runs differ in device, torch version or threads, which alone can change bits."


def test_other_seeds_are_refused(tmp_path: Path) -> None:
    runs = [run(tmp_path, "fp32"), run(tmp_path, "fp32", 1112), run(tmp_path, "manual")]
    assert "seed is 1111, 1112 in fp32 but 1111 in manual" in refusal(runs)
    assert compare(runs, [failure("manual", 1112)]).differences == []
    assert compare(runs, anyway=True).modes[1].verdict.pairs == 1


def test_many_runs_are_named_shortly(tmp_path: Path) -> None:
    runs = [run(tmp_path, "fp32", seed) for seed in SEEDS] + [
        run(tmp_path, "manual", seed, job={"bptt": 1}) for seed in SEEDS
    ]
    assert " and 2 more" in refusal(runs)


def test_hostile_names_stay_on_one_line(tmp_path: Path) -> None:
    runs = [run(tmp_path, "fp32"), run(tmp_path, "a\n\x1b[31m<b>", job={"model": "x\r\n" * 100})]
    assert "x\\r\\nx" in refusal(runs)


def test_figures_of_a_mode(tmp_path: Path) -> None:
    make_runs(tmp_path, "fp32", [5.0, 5.5, 6.0])
    scales = [65536.0] * 2 + [32768.0] * 6
    run_a = make_run(tmp_path / "a", "amp-fp16", 1112, test_loss=5.5, loss_scales=[8.0] * 8, peak_memory_bytes=7)
    taken = [True, False] + [True] * 6
    run_b = make_run(tmp_path / "b", "amp-fp16", 1111, OTHER, 5.25, scales, taken, tokens_per_second=500.0)
    run_c = make_run(tmp_path / "c", "amp-fp16", 1113, LOSSES[:3], 9.0, status="interrupted", tokens_per_second=None)
    paths = [*sorted(tmp_path.glob("fp32*")), run_a, run_b, run_c]
    mode = compare([read_run(path) for path in paths]).modes[1]
    assert [r.seed for r in mode.runs] == [1111, 1112, 1113]
    assert mode.status == "finished, interrupted"
    assert mode.test_loss == 5.375  # an interrupted run's test loss is of another length of training
    assert mode.test_ppl == pytest.approx(math.exp(5.375), rel=1e-15)
    assert (mode.steps, mode.updates, mode.skipped) == (19, 18, 1)
    assert (mode.final_loss_scale, mode.tokens_per_second, mode.peak_memory_bytes) == (32768.0, 750.0, 400_000_000)
    assert (mode.verdict.word, mode.verdict.pairs, mode.verdict.difference) == ("described", 2, 0.125)
    assert mode.first_difference == 5


@pytest.mark.parametrize("status", [None, "interrupted", "diverged"])
def test_unfinished_runs_have_no_test_loss(tmp_path: Path, status: str | None) -> None:
    mode = compare([run(tmp_path, "fp32"), run(tmp_path, "manual", status=status)]).modes[1]
    assert mode.status == (status or "unfinished")
    assert (mode.test_loss, mode.test_ppl, mode.verdict.word) == (None, None, "not finished")


def test_verdicts_are_paired_by_seed_and_take_the_margin(tmp_path: Path) -> None:
    paths = make_runs(tmp_path, "fp32", [5.0, 6.0, 7.0]) + make_runs(tmp_path, "manual", [5.02, 6.021, 7.019])
    runs = [read_run(path) for path in paths]
    assert compare(runs).modes[1].verdict.word == "worse"
    assert compare(runs[::-1], reference="manual").modes[1].verdict.word == "better"
    assert compare(runs, margin=0.03).modes[1].verdict.word == "equivalent"


def test_first_difference_is_the_least_over_seeds(tmp_path: Path) -> None:
    early = [*LOSSES[:2], 1.0, *LOSSES[3:]]
    runs = [run(tmp_path, "fp32", seed) for seed in SEEDS[:2]]
    runs += [run(tmp_path, "manual", 1111, OTHER), run(tmp_path, "manual", 1112, early)]
    runs += [run(tmp_path, "amp-fp16", seed, LOSSES[:6]) for seed in SEEDS[:2]]
    assert [mode.first_difference for mode in compare(runs).modes] == [None, 3, None]


def test_says_what_the_intervals_cover(tmp_path: Path) -> None:
    lines = compare([run(tmp_path, "fp32"), run(tmp_path, "manual")]).covers
    assert "covers the variation between seeds" in lines[0]
    assert "does not cover other data" in lines[1]
    assert len(lines) == 3
    three = [p for label in ("fp32", "manual", "amp-fp16") for p in make_runs(tmp_path / "m", label, [5.0, 5.1, 5.2])]
    assert "Each of the 2 verdicts has its own 5% risk" in compare([read_run(p) for p in three]).covers[3]
