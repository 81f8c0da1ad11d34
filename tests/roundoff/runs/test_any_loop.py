"""The record of any training loop: a table of loops, each with at most four lines for its record."""

import argparse
import functools
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pages import Page
from roundoff import Listener, RunDirectory, StepResult, compare_runs, read_run
from roundoff.errors import UsageError
from roundoff.report.comparison_panels import panels
from roundoff.report.html import write_html
from roundoff.report.png import write_png
from roundoff.report.summary import table, write_summary
from roundoff.runs.listeners import listening

STEPS = 6
JOB = {"model": "linear", "lr": 0.5}
LOSSES = [2.0**-k for k in range(STEPS)]
"""Of step 1, 2 and so on: each step halves it."""


class Training:
    """A loop's model: `step` returns a loss, and all of its state is `left`."""

    def __init__(self) -> None:
        self.left = torch.tensor(2.0)

    def step(self) -> torch.Tensor:
        self.left = self.left / 2
        return self.left.clone()


class PowerCutError(Exception):
    """Ends a loop."""


def with_a_test(run: RunDirectory) -> None:
    run.finish(test_loss=0.25)


def with_the_seam(path: Path, mode: str) -> None:
    model = Training()
    with RunDirectory(path, job=JOB, mode=mode, seed=1) as run:
        for _ in range(STEPS):
            loss = model.step()
            result = StepResult(torch.tensor(True), loss * 3, torch.tensor(128.0))
            run.step(loss, result)
        run.finish(test_loss=0.25)


def by_name(path: Path, mode: str) -> None:
    model = Training()
    with RunDirectory(path, job=JOB, mode=mode, seed=1, loss_scale="dynamic") as run:
        for k in range(STEPS):
            loss = model.step()
            run.step(loss, grad_norm=float(loss) * 3, loss_scale=2.0**k, applied=k != 1, lr=0.5)
        run.finish(test_loss=0.25)


def of_losses_alone(path: Path, mode: str, end: Callable[[RunDirectory], None] = with_a_test) -> None:
    model = Training()
    with RunDirectory(path, job=JOB, mode=mode, seed=1) as run:
        for _ in range(STEPS):
            run.step(model.step())
        end(run)


def of_several_losses(path: Path, mode: str) -> None:
    model = Training()
    with RunDirectory(path, job=JOB, mode=mode, seed=1) as run:
        for k in range(STEPS):
            loss = model.step()
            run.step(loss, losses={"kl": loss / 4, "<b>$x$": k} if k != 2 else {"kl": loss / 4})
        run.finish(test_loss=0.25)


def of_epochs(path: Path, mode: str) -> None:
    model = Training()
    with RunDirectory(path, job=JOB, mode=mode, seed=1) as run:
        for _ in range(2):
            for _ in range(STEPS // 2):
                run.step(model.step())
            run.epoch(model.left * 2)
        run.finish(test_loss=0.25)


def resumed(path: Path, mode: str) -> None:
    """A power cut after step 5; the checkpoint is of step 3."""
    model, kept = Training(), dict[str, Any]()
    try:
        with RunDirectory(path, job=JOB, mode=mode, seed=1) as run:
            for k in range(STEPS):
                run.step(model.step())
                if k == 2:
                    kept = {"model": model.left, "run": run.state()}
                if k == 4:
                    raise PowerCutError
    except PowerCutError:
        model.left = kept["model"]
    with RunDirectory.resume(path, kept["run"]) as run:
        for _ in range(3, STEPS):
            run.step(model.step())
        run.finish(test_loss=0.25)


def that_fails(path: Path, mode: str) -> None:
    def end(run: RunDirectory) -> None:
        raise PowerCutError

    with suppress(PowerCutError):
        of_losses_alone(path, mode, end)


Loop = Callable[[Path, str], None]
KNOWN = ["loss", "difference", "size", "validation", "scale"]
LOOPS: dict[str, tuple[Loop, dict[str, Any]]] = {
    "with the seam": (with_the_seam, {"norms": [3 * x for x in LOSSES], "scales": [128.0] * STEPS, "test": "0.2500"}),
    "by name": (
        by_name,
        {
            "norms": [3 * x for x in LOSSES], "scales": [2.0**k for k in range(STEPS)], "test": "0.2500",
            "applied": [k != 1 for k in range(STEPS)],
        },
    ),
    "of losses alone": (of_losses_alone, {"test": "0.2500"}),
    "of several losses": (
        of_several_losses,
        {"more": {"kl": [x / 4 for x in LOSSES], "<b>$x$": [0, 1, math.nan, 3, 4, 5]}, "test": "0.2500"},
    ),
    "of epochs": (of_epochs, {"valid": [0.5, 0.0625], "test": "0.2500"}),
    "resumed": (resumed, {"test": "0.2500"}),
    "without a test": (functools.partial(of_losses_alone, end=RunDirectory.finish), {"test": None}),
    "that fails": (that_fails, {"test": None, "status": "interrupted"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_recorded_read_compared_and_drawn(tmp_path: Path, name: str) -> None:
    loop, expected = LOOPS[name]
    for mode in ("a", "b"):
        loop(tmp_path / mode, mode)
    run, other = (read_run(tmp_path / mode) for mode in ("a", "b"))
    norms = expected.get("norms", [math.nan] * STEPS)
    assert (run.status, run.seed, run.job, run.problems) == (expected.get("status", "finished"), 1, JOB, [])
    assert run.steps["step"] == list(range(1, STEPS + 1))
    assert run.steps["loss"] == LOSSES
    assert run.steps["grad_norm"] == pytest.approx(norms, nan_ok=True)
    assert run.steps["loss_scale"] == expected.get("scales", [1.0] * STEPS)
    assert run.steps["applied"] == expected.get("applied", [True] * STEPS)
    assert [row["valid_loss"] for row in run.epochs] == expected.get("valid", [])
    assert list(run.losses) == list(expected.get("more", {}))
    for column, values in expected.get("more", {}).items():
        assert run.losses[column] == pytest.approx(values, nan_ok=True)
    comparison = compare_runs([run, other])
    assert (comparison.differences, comparison.modes[1].first_difference) == ([], None)
    row = next(line for line in table(comparison).splitlines() if line.startswith("a ")).split()
    assert row[3] == ("-" if "status" in expected else "0.0729")  # of the last three steps
    assert expected["test"] in (row[4], None)
    drawn = {panel.id: panel for panel in panels(comparison)}
    more = [f"further-{i}" for i in range(len(run.losses))]
    assert list(drawn) == KNOWN + (["norm"] if not math.isnan(norms[0]) else []) + more
    assert bool(drawn["validation"].items) == bool(expected.get("valid"))
    write_summary(tmp_path / "summary.json", comparison)
    write_html(tmp_path / "report.html", comparison)
    write_png(tmp_path / "curves.png", comparison)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text.partition("Precision modes compared")[2]
    summary = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert not re.findall(r"\b(nats|perplexity|\w*ppl|a word|words)\b", table(comparison) + page + summary)
    assert "nan" not in table(comparison).split("\n\n")[0] + summary


def test_further_losses_are_panels_of_their_own(tmp_path: Path) -> None:
    """With a gap where a step has none, and names that are text."""
    of_several_losses(tmp_path / "a", "a")
    of_losses_alone(tmp_path / "b", "b")
    comparison = compare_runs([read_run(tmp_path / name) for name in ("a", "b")])
    kl, odd = list(panels(comparison))[-2:]
    assert (kl.title, kl.y.label, odd.title) == ("Loss: kl", "kl", "Loss: <b>$x$")
    curves = [item for item in kl.items if hasattr(item, "y")]
    assert curves[0].y.tolist() == [x / 4 for x in LOSSES]
    assert all(map(math.isnan, curves[1].y))  # the other mode has none
    write_html(tmp_path / "report.html", comparison)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h3>Loss: &lt;b&gt;$x$</h3>" in page
    assert '"title":{"text":"\\u003cb' not in page


def test_more_losses_than_a_page_could_show_are_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        run.step(1.0, losses={str(i): i for i in range(16)})
        with pytest.raises(UsageError, match="losses has 17 names; at most 16 are recorded"):
            run.step(1.0, losses={str(i): i for i in range(17)})
    rows = [json.loads((tmp_path / "run/steps.jsonl").read_text()) | {"step": i + 1} for i in range(2)]
    rows[1]["losses"] = {"other": 1}
    (tmp_path / "run/steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=r"steps\.jsonl names 17 further losses, where at most 16 belong"):
        read_run(tmp_path / "run")


def test_a_norm_that_nobody_knows_is_told_to_nobody(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Hears:
        interval = heard.append

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    with listening(Hears()):  # type: ignore[arg-type]
        of_losses_alone(tmp_path / "a", "a")
        with_the_seam(tmp_path / "b", "b")
    assert ["grad_norm" in row for row in heard] == [False, True]


@pytest.mark.parametrize(
    ("scale", "said", "read"),
    [(None, {}, 1.0), (128, {"loss_scale": 128}, 128.0), ("dynamic", {"loss_scale": None}, None)],
)
def test_what_a_run_says_of_its_loss_scale(tmp_path: Path, scale: Any, said: dict[str, Any], read: Any) -> None:
    with RunDirectory(tmp_path / "run", mode="m", loss_scale=scale) as run:
        run.step(1.0)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["precision"] == {"mode": "m"} | said
    assert read_run(tmp_path / "run").loss_scale == read


def test_a_loss_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"loss_scale='static': give a number, or \"dynamic\""):
        RunDirectory(tmp_path / "run", loss_scale="static")


UNITS: dict[str | None, tuple[str, str]] = {
    "nats a word": ("test\nppl", "training loss, nats a word"),
    "nats a token": ("test\nppl", "training loss, nats a token"),
    "bits a byte": ("test\nloss", "training loss, bits a byte"),
    None: ("test\nloss", "training loss"),
}


@pytest.mark.parametrize("unit", UNITS)
def test_reports_say_the_unit_that_the_runs_say(tmp_path: Path, unit: str | None) -> None:
    """Exp of a loss in nats a word or a token is a perplexity, and of no other."""
    head, label = UNITS[unit]
    for mode in ("a", "b"):
        with RunDirectory(tmp_path / mode, mode=mode, unit=unit) as run:
            run.step(2.0)
            run.epoch(1.5)
            run.finish(1.0)
    comparison = compare_runs([read_run(tmp_path / mode) for mode in ("a", "b")])
    perplexity = head.endswith("ppl")
    assert (comparison.unit, comparison.has_perplexity) == (unit, perplexity)
    assert comparison.modes[0].test_ppl == (math.e if perplexity else None)
    drawn = {panel.id: panel for panel in panels(comparison)}
    assert drawn["loss"].y.label == label
    assert drawn["validation"].title == ("Validation perplexity" if perplexity else "Validation loss")
    curve = drawn["validation"].items[0]
    assert curve.y.tolist() == [pytest.approx(math.exp(1.5) if perplexity else 1.5)]  # type: ignore[union-attr]
    short = "" if unit is None else f" {unit.split()[0]}"
    assert f"training loss of the second half 2.0000{short}, mean of 1 seed" in table(comparison)
    write_summary(tmp_path / "summary.json", comparison)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        ("test_ppl" in summary["modes"][0])
        == ("valid_ppl" in summary["modes"][0]["runs"][0]["epochs"][0])
        == perplexity
    )
    assert summary.get("unit") == (None if perplexity else unit)


def test_a_unit_made_to_do_harm_is_text(tmp_path: Path) -> None:
    unit = "</script><b>$x\x1b[2J" + "y" * 5000
    for mode in ("a", "b"):
        with RunDirectory(tmp_path / mode, mode=mode, unit=unit) as run:
            run.step(2.0)
            run.epoch(1.5)
            run.finish(1.0)
    comparison = compare_runs([read_run(tmp_path / mode) for mode in ("a", "b")])
    assert table(comparison).replace("\n", "").isprintable()
    assert len(table(comparison)) < 3000
    write_png(tmp_path / "curves.png", comparison)
    write_html(tmp_path / "report.html", comparison)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    page.runs_only_its_scripts()
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert page.charts["loss"]["layout"]["yaxis"]["title"]["text"].startswith("training loss, &lt;/script&gt;&lt;b&gt;")


def test_losses_in_two_units_are_not_compared(tmp_path: Path) -> None:
    for mode, unit in (("a", "nats a word"), ("b", None)):
        with RunDirectory(tmp_path / mode, mode=mode, unit=unit) as run:
            run.step(2.0)
            run.finish(1.0)
    runs = [read_run(tmp_path / mode) for mode in ("a", "b")]
    with pytest.raises(UsageError, match=r'loss_unit is "nats a word" in .*/a, not there in .*/b'):
        compare_runs(runs)
    assert compare_runs(runs, anyway=True).unit is None


def test_fields_that_say_how_long_training_goes(tmp_path: Path) -> None:
    """Runs of other lengths must agree as far as both go, where both modes name each other."""
    for mode, other, steps in (("a", "b", 3), ("b", "a", 2)):
        job = {"steps": steps, "lr": 1}
        with RunDirectory(tmp_path / mode, mode=mode, equals=[other], job=job, length=["steps"], device="cpu") as run:
            for _ in range(steps):
                run.step(1.0)
    (pair,) = compare_runs([read_run(tmp_path / mode) for mode in ("a", "b")], anyway=True).pairs
    assert (pair.expected, pair.steps) == (True, 2)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a run is there": (
        lambda path: RunDirectory(path), "path={} holds a run already; give a new one, or RunDirectory.resume(path, "
        "state) to go on with it",
    ),
    "no run is there": (
        lambda path: RunDirectory.resume(path.parent, None),
        "RunDirectory.resume: path={parent} holds no run (there is no config.json); give a run directory",
    ),
    "no directory is there": (
        lambda path: RunDirectory.resume(path.parent / "none", None),
        "RunDirectory.resume: path={parent}/none: cannot open it (No such file or directory); give a run directory",
    ),
    "a file is there": (
        lambda path: RunDirectory(path / "config.json"), "path={}/config.json: cannot write there (File exists); give "
        "another directory",
    ),
    "another job": (
        lambda path: RunDirectory.resume(path, None, job={}),
        'RunDirectory.resume: path={}: the run was started with job {{"model": "linear", "lr": 0.5}}, not {{}}; '
        "give the same, or start a new run",
    ),
    "the state of a longer run": (
        lambda path: RunDirectory.resume(path, {"steps": 9, "skipped": 0, "steps.jsonl": 9999, "epochs.jsonl": 0}),
        "RunDirectory.resume: path={}: state is not one of this run (steps.jsonl has {size} bytes, not 9999)",
    ),
    "something else than a state": (
        lambda path: RunDirectory.resume(path, {"step": 3}),
        "RunDirectory.resume: path={}: state is not one of this run ('steps.jsonl')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_the_arguments_of_python(tmp_path: Path, case: str) -> None:
    """And the directory is as it was, and free."""
    path = tmp_path / "run"
    of_losses_alone(path, "a")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    do, said = REFUSED[case]
    with pytest.raises(UsageError) as error:
        do(path)
    size = (path / "steps.jsonl").stat().st_size
    assert str(error.value) == said.format(path, parent=tmp_path, size=size)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    RunDirectory.resume(path, None).close()


FIGURES: dict[str, tuple[dict[str, Any], str]] = {
    "a matrix": (
        {"confusion": torch.eye(2)}, "figure confusion is a tensor of shape (2, 2); give numbers",
    ),
    "one within": ({"by": {"class": [torch.ones(3)]}}, "figure by.class[0] is a tensor of shape (3,); give numbers"),
    "a set": ({"classes": {1}}, "figure classes is a set; give a list"),
    "a speed in words": (
        {"tokens_per_second": "fast"},
        "figure tokens_per_second is 'fast', where a number, \"inf\", \"-inf\" or \"nan\", or null belongs",
    ),
    "half a byte": (
        {"peak_memory_bytes": 0.5}, "figure peak_memory_bytes is 0.5, where a whole number, or null belongs",
    ),
    "the status": ({"status": "x"}, "figure status is one that the record has itself; give another name"),
    "the count": ({"steps": 100}, "figure steps is one that the record has itself; give another name"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIGURES)
def test_a_figure_that_no_result_can_hold_is_refused(tmp_path: Path, case: str) -> None:
    """The run can be finished without it. A loop that ends there is interrupted, with its test loss."""
    figures, said = FIGURES[case]

    def train(path: Path) -> None:
        with RunDirectory(path) as run:
            run.step(2.0)
            try:
                run.finish(test_loss=0.5, **figures)
            except UsageError:
                if path.name == "again":
                    run.finish(0.25, top1=0.5)
                raise

    for name in ("again", "ends"):
        with pytest.raises(UsageError) as error:
            train(tmp_path / name)
        assert str(error.value) == said
    ended = read_run(tmp_path / "ends")
    assert (ended.status, ended.test_loss, ended.problems) == ("interrupted", 0.5, [])
    finished = read_run(tmp_path / "again")
    assert (finished.status, finished.test_loss) == ("finished", 0.25)
    result = json.loads((tmp_path / "again/result.json").read_text())
    assert (result["top1"], result["steps"]) == (0.5, 1)


DEVICES = 'give one that torch finds here, such as "cpu" or "cuda:0"'
EVENTS = "start, interval, epoch, result"


class Heard(Listener):
    """Hears, and does nothing."""


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a negative seed": ({"seed": -1}, "seed is -1, where a whole number belongs"),
    "no device": ({"device": "cqu"}, f"device is 'cqu'; {DEVICES}"),
    "a device that is not here": ({"device": "cuda:99"}, f"device is 'cuda:99'; {DEVICES}"),
    "a device that is a model": ({"device": torch.nn.ReLU()}, f"device is a ReLU; {DEVICES}"),
    "one listener": ({"listeners": Heard()}, f"listeners is a Heard; give a list of objects with {EVENTS}"),
    "a function that listens": (
        {"listeners": [print]},
        f"listener builtin_function_or_method lacks {EVENTS}; give an object of a subclass of roundoff.Listener",
    ),
    "a class that listens": (
        {"listeners": [Heard]}, "listener Heard is a class; give an object of a subclass of roundoff.Listener",
    ),
    "a seed in words": ({"seed": "x"}, "seed is 'x', where a whole number belongs"),
    "a seed that is true": ({"seed": True}, "seed is True, where a whole number belongs"),
    "no mode": ({"mode": None}, "mode is None, where a text belongs"),
    "a unit that is a number": ({"unit": 3}, 'unit is 3; give a text, such as "nats a word"'),
    "a length that is a text": ({"length": "steps"}, "length is 'steps'; give a list of names, such as ['steps']"),
    "a length that is a number": ({"length": 3}, "length is 3; give a list of names"),
    "a length of numbers": ({"length": [3]}, "length is [3], where a list of texts, or null belongs"),
    "modes that are a text": ({"equals": "manual"}, "equals is 'manual'; give a list of names, such as ['manual']"),
    "a scale that is true": (
        {"loss_scale": True}, 'loss_scale is True, where a number, "inf", "-inf" or "nan", or null belongs',
    ),
    "a dtype that is a type": (
        {"dtype": float}, "dtype is a type; give a number, a text, a list or a mapping",
    ),
    "options": ({"job": argparse.Namespace(lr=1)}, "job is a Namespace; give a mapping, such as vars(args)"),
    "options within": (
        {"job": {"args": argparse.Namespace(lr=1)}}, "job.args is a Namespace; give a mapping, such as vars(args)",
    ),
    "a job that is a list": ({"job": [1]}, "job is [1], where an object belongs"),
    "a set": ({"job": {"layers": {1}}}, "job.layers is a set; give a list"),
    "an array": ({"job": {"w": [np.ones((2, 2))]}}, "job.w[0] is an array of shape (2, 2); give numbers"),
    "an array as a job": ({"job": np.ones(2)}, "job is an array of shape (2,); give numbers"),
    "a deep job": (
        {"job": {"a": functools.reduce(lambda inner, _: [inner], range(19), [])}},
        f"job.a{'[0]' * 19} is nested more than 20 deep; give a flatter one",
    ),
    "a long job": (
        {"job": {"text": "x" * 2**20}}, "job and what else config.json holds takes more than 524288 bytes; give less",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_run_that_could_not_be_read_is_not_begun(tmp_path: Path, case: str) -> None:
    given, said = CONFIGS[case]
    with pytest.raises(UsageError) as error:
        RunDirectory(tmp_path / "run", **given)
    assert str(error.value) == said
    assert not (tmp_path / "run").exists()


def test_options_are_refused_as_a_job_of_a_run_that_goes_on(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", job={"lr": 1}).close()
    with pytest.raises(UsageError, match=r": job is a Namespace; give a mapping, such as vars\(args\)$"):
        RunDirectory.resume(tmp_path / "run", None, job=argparse.Namespace(lr=1))


def test_what_numpy_and_torch_count_is_taken(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", seed=np.int64(3), loss_scale=np.float32(2)) as run:  # type: ignore[arg-type]
        run.step(1.0)
        run.epoch(np.ones(1), epoch=np.int64(2), seconds=torch.tensor(3))  # type: ignore[arg-type]
        run.step(1.0)
        run.finish(np.float32(0.5))  # type: ignore[arg-type]
    read = read_run(tmp_path / "run")
    assert (read.seed, read.loss_scale, read.test_loss, read.steps["epoch"]) == (3, 2.0, 0.5, [1, 3])
    assert [(row["epoch"], row["valid_loss"], row["seconds"]) for row in read.epochs] == [(2, 1.0, 3.0)]


EPOCHS: dict[str, tuple[dict[str, Any], str]] = {
    "half an epoch": ({"epoch": 0.5}, "epoch is 0.5; give a whole number"),
    "no loss": ({"valid_loss": None}, "valid_loss is None; give one number"),
    "two losses": ({"valid_loss": torch.ones(2)}, "valid_loss is a tensor of shape (2,); give one number"),
    "a rate in words": ({"lr": "fast"}, "lr is 'fast'; give one number"),
    "a time in words": ({"seconds": "long"}, "seconds is 'long'; give one number"),
}


@pytest.mark.parametrize("case", EPOCHS)
def test_an_epoch_that_could_not_be_read_is_refused(tmp_path: Path, case: str) -> None:
    given, said = EPOCHS[case]
    with RunDirectory(tmp_path / "run") as run:
        run.step(1.0)
        with pytest.raises(UsageError) as error:
            run.epoch(**{"valid_loss": 1.0} | given)
        run.epoch(0.5)
        run.finish()
    assert str(error.value) == said
    assert [(row["epoch"], row["valid_loss"]) for row in read_run(tmp_path / "run").epochs] == [(1, 0.5)]


@pytest.mark.parametrize(
    ("loss", "read"),
    [(1e39, math.inf), (-(10**400), -math.inf), (math.nan, math.nan)],
    ids=["1e39", "an integer", "nan"],
)
def test_a_loss_that_fp32_cannot_hold_is_infinite(tmp_path: Path, loss: float, read: float) -> None:
    with RunDirectory(tmp_path / "run") as run:
        run.step(1.0)
        run.epoch(loss)
        run.finish(test_loss=loss)
    record = read_run(tmp_path / "run")
    assert [record.test_loss, record.epochs[0]["valid_loss"]] == pytest.approx([read] * 2, nan_ok=True)


STEP_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "two losses": ({"loss": torch.ones(2)}, "loss is a tensor of shape (2,); give one number"),
    "no loss": ({"loss": None}, "loss is None; give one number"),
    "a complex loss": ({"loss": torch.tensor(1j)}, "loss is a complex tensor; give one number"),
    "a complex number": ({"loss": 1j}, "loss is 1j; give one number"),
    "a text": ({"loss": "0.5"}, "loss is '0.5'; give one number"),
    "an array": ({"loss": np.ones((1, 2))}, "loss is an array of shape (1, 2); give one number"),
    "norms": ({"grad_norm": torch.ones(3)}, "grad_norm is a tensor of shape (3,); give one number"),
    "no scale": ({"loss_scale": None}, "loss_scale is None; give one number"),
    "nothing of whether": ({"applied": None}, "applied is None; give one number"),
    "a rate in words": ({"lr": "fast"}, "lr is 'fast'; give one number"),
    "half an epoch": ({"epoch": 0.5}, "epoch is 0.5; give a whole number"),
    "tokens in words": ({"tokens": "many"}, "tokens is 'many'; give one number"),
    "a further loss of none": ({"losses": {"kl": None}}, "losses['kl'] is None; give one number"),
    "further losses without names": ({"losses": [1.0]}, 'losses is a list; give a mapping, such as {"kl": kl}'),
    "a norm as the result": (
        {"result": torch.tensor(1.0)},
        "result is a tensor of shape (); give what precision.step returned, or grad_norm=...",
    ),
    "a result of two norms": (
        {"result": StepResult(torch.tensor(True), torch.ones(2), torch.tensor(1.0))},
        "grad_norm is a tensor of shape (2,); give one number",
    ),
}


@pytest.mark.parametrize("case", STEP_ARGUMENTS)
def test_a_step_that_cannot_be_recorded_is_refused_whole(tmp_path: Path, case: str) -> None:
    given, said = STEP_ARGUMENTS[case]
    with RunDirectory(tmp_path / "run") as run:
        run.step(2.0)
        with pytest.raises(UsageError) as error:
            run.step(**{"loss": 1.0} | given)
        run.step(0.5)
        run.finish()
    assert str(error.value) == said
    record = read_run(tmp_path / "run")
    assert (record.steps["loss"], record.losses, record.problems) == ([2.0, 0.5], {}, [])


def test_a_norm_may_be_none(tmp_path: Path) -> None:
    """As trainers log it where nothing was clipped."""
    with RunDirectory(tmp_path / "run") as run:
        run.step(2.0, grad_norm=None)
    assert read_run(tmp_path / "run").steps["grad_norm"] == pytest.approx([math.nan], nan_ok=True)


def test_a_step_takes_numbers_of_any_kind(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        given: dict[str, Any] = {"lr": np.float64(0.25), "epoch": np.int64(2), "applied": np.bool_(False)}
        run.step(np.float32(0.5), **given)  # type: ignore[arg-type]
        run.step(torch.ones(1, 1, requires_grad=True), losses={"kl": np.ones(1), "n": 2**70})  # type: ignore[dict-item]
        run.step(1e39, losses={"kl": 1, "n": True})
    record = read_run(tmp_path / "run")
    assert record.steps["loss"] == [0.5, 1.0, math.inf]
    assert (record.steps["applied"], record.steps["epoch"]) == ([False, True, True], [2, 1, 1])
    assert record.steps["lr"][0] == 0.25
    assert (record.losses["kl"][1:], record.losses["n"][1:]) == ([1.0, 1.0], [2.0**70, 1.0])


@pytest.mark.parametrize("finished", [True, False])
def test_after_its_end_a_run_records_nothing_more(tmp_path: Path, finished: bool) -> None:
    """Steps that nobody would fetch are refused, not lost. `go_back` begins anew."""
    with RunDirectory(tmp_path / "run") as run:
        run.step(2.0)
        state = run.state()
        if finished:
            run.finish(0.5)
    for more in (lambda: run.step(1.0), lambda: run.epoch(1.0), lambda: run.finish(0.25)):
        with pytest.raises(
            UsageError, match=r"^the run has ended; a new RunDirectory, or RunDirectory\.resume, records"
        ):
            more()
    read = read_run(tmp_path / "run")
    assert (read.steps["loss"], read.test_loss, read.problems) == ([2.0], 0.5 if finished else None, [])
    with RunDirectory.resume(tmp_path / "run", state) as again:
        again.step(1.0)
        again.finish()
        again.go_back(state)
        again.step(1.5)
        again.finish(0.125)
    read = read_run(tmp_path / "run")
    assert (read.steps["loss"], read.test_loss, read.problems) == ([2.0, 1.5], 0.125, [])
