"""`compare`: a training function is run in each mode with each seed, recorded, and judged."""

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import roundoff
from programs import ROOT
from roundoff.errors import RunError, UsageError
from roundoff.modes import Build
from roundoff.runs.reading import read_run

MODES = ("fp32", "amp-bf16")
STEPS = 20


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.125)


def trained(build: Build, seed: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """A small net on a small regression, whose data and weights come from the seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    precision = build(model, sgd)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(16, 4).to(model[0].weight.dtype)
        model.zero_grad()
        with precision.forward():
            loss = (model(x).float() - x.float().sum(1, keepdim=True)).square().mean()
        precision.backward(loss)
        precision.step(1.0)
        losses.append(loss.detach())
    return model, losses


def with_test(build: Build, seed: int) -> tuple[list[torch.Tensor], float]:
    """Losses, and a loss on data that no seed draws."""
    model, losses = trained(build, seed)
    x = torch.linspace(-1, 1, 64).reshape(16, 4)
    with torch.no_grad():
        predicted = model(x.to(next(model.parameters()).dtype)).float()
    return losses, float((predicted - x.sum(1, keepdim=True)).square().mean())


def untested(build: Build, seed: int) -> list[torch.Tensor]:
    return trained(build, seed)[1]


def test_the_verdict_is_that_of_the_same_runs_recorded_by_hand(tmp_path: Path) -> None:
    """Losses, outcomes of the steps, test losses and figures, to the bit."""
    report = roundoff.compare(with_test, MODES, 3, margin=0.05, folder=tmp_path / "a", job={"width": 8})
    runs = []
    for label, build in roundoff.modes.named(MODES).items():
        for seed in range(3):
            losses, test_loss = with_test(build, seed)
            with roundoff.RunDirectory(tmp_path / f"b/{label}-{seed}", job={"width": 8}, mode=label, seed=seed) as run:
                for loss in losses:
                    run.step(loss)
                run.finish(test_loss)
            runs.append(read_run(run.path or ""))
    by_hand = roundoff.compare_runs(runs, margin=0.05)
    for ours, theirs in zip(report.comparison.modes, by_hand.modes, strict=True):
        assert (ours.label, ours.verdict, ours.test_loss) == (theirs.label, theirs.verdict, theirs.test_loss)
        assert [run.steps["loss"] for run in ours.runs] == [run.steps["loss"] for run in theirs.runs]
        assert (ours.verdict.pairs, ours.status, ours.updates) == (3, "finished", 3 * STEPS)
    table = str(report)
    assert "amp-bf16" in table
    assert not re.search(r"\b(ppl|perplexity|nats|words?|tokens)\b", table)


def test_each_step_is_recorded_without_a_word_in_the_loop(tmp_path: Path) -> None:
    """Gradient norm, loss scale, whether it was applied, and the learning rate, as `step` returned them."""
    seen: list[roundoff.StepResult] = []

    def build(model: nn.Module, optimizer: Any) -> roundoff.Precision:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # it overflows at first
        precision = roundoff.Autocast(optimizer(list(model.parameters())), scaler, "cpu", torch.float16)
        step = precision.step
        precision.step = lambda norm: seen.append(step(norm)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
        return precision

    report = roundoff.compare(untested, {"mine": build}, [5])
    (run,) = report.comparison.modes[0].runs
    assert run.steps["grad_norm"] == pytest.approx([float(r.grad_norm) for r in seen], nan_ok=True)
    assert run.steps["loss_scale"] == [float(r.loss_scale) for r in seen]
    assert run.steps["applied"] == [bool(r.applied) for r in seen]
    assert run.steps["lr"] == [0.125] * STEPS
    assert {True, False} == set(run.steps["applied"])
    assert (run.seed, run.device) == (5, roundoff.device.device_name("cpu"))


def test_the_second_half_of_the_steps_is_compared(tmp_path: Path) -> None:
    """And the table, the page and the summary say so, of runs without a test loss too."""
    report = roundoff.compare(untested, MODES, 3, folder=tmp_path / "runs")
    for mode in report.comparison.modes:
        ends = [sum(run.steps["loss"][STEPS // 2 :]) / (STEPS // 2) for run in mode.runs]
        assert mode.end_loss == pytest.approx(sum(ends) / 3)
        assert (mode.test_loss, mode.test_ppl, mode.verdict.pairs) == (None, None, 3)
    assert "training loss of the second half minus" in report.comparison.modes[1].verdict.sentence
    assert "Train loss is the mean over the second half of the steps" in str(report)
    assert "Test loss" not in str(report)
    report.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "report.html", "curves.png"}
    page = (tmp_path / "out/report.html").read_text()
    assert "training losses over the second half of the steps surely differ by less than 0.01 are" in page
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["end"] == "training loss of the second half"
    assert summary["modes"][0]["end_loss"] == report.comparison.modes[0].end_loss
    assert "test_ppl" not in summary["modes"][0]


def test_finished_runs_are_kept_and_others_are_trained(tmp_path: Path) -> None:
    """Also with more seeds and modes than before; a folder of another job is refused."""
    trained_now: list[int] = []

    def train(build: Build, seed: int) -> Any:
        trained_now.append(seed)
        return with_test(build, seed)

    first = roundoff.compare(train, MODES, 2, folder=tmp_path, job={"lr": 1})
    assert len(trained_now) == 4
    again = roundoff.compare(train, MODES, 2, folder=tmp_path, job={"lr": 1})
    assert len(trained_now) == 4
    said = "4 of 4 runs were kept from before. They show what `train` did then, with this `job`."
    assert again.comparison == replace(first.comparison, covers=[said, *first.comparison.covers])
    assert (said in str(again), "from before" in str(first)) == (True, False)
    (tmp_path / "fp32-1" / "result.json").unlink()  # as of a process that was killed
    (tmp_path / "amp-bf16-0" / "steps.jsonl").write_text("")
    more = roundoff.compare(train, [*MODES, "masters-bf16"], 3, folder=tmp_path, job={"lr": 1})
    assert more.comparison.covers[0].startswith("2 of 9 runs were kept from before.")
    assert trained_now[4:] == [0, 0, 1, 1, 2, 2, 2]
    with pytest.raises(UsageError, match=r"fp32-0 holds a run of another job; give the same again, or another folder"):
        roundoff.compare(train, MODES, 2, folder=tmp_path, job={"lr": 2})
    (tmp_path / "fp32-1" / "result.json").unlink()
    (tmp_path / "fp32-1" / "checkpoint.pt").touch()
    with pytest.raises(UsageError, match=r"fp32-1 holds checkpoint\.pt beside a run that has not finished"):
        roundoff.compare(train, MODES, 2, folder=tmp_path, job={"lr": 1})
    assert (tmp_path / "fp32-1" / "checkpoint.pt").exists()
    (tmp_path / "fp16-0").mkdir()
    with pytest.raises(UsageError, match="fp16-0 holds something else than a run"):
        roundoff.compare(train, ["fp16"], 1, folder=tmp_path)


def test_a_seed_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    def train(build: Build, seed: int) -> Any:
        if seed == 1:
            raise ValueError("no such\nbatch")
        return with_test(build, seed)

    report = roundoff.compare(train, MODES, 2, folder=tmp_path)
    assert [mode.verdict.pairs for mode in report.comparison.modes] == [1, 1]
    assert r"amp-bf16 with seed 1: failed: ValueError: no such\nbatch" in str(report)
    with pytest.raises(RunError, match=r"every run failed; the first one, fp32 with seed 1: ValueError: no such"):
        roundoff.compare(train, MODES, [1])


def test_an_interrupt_ends_at_once_and_keeps_what_was_run(tmp_path: Path) -> None:
    def train(build: Build, seed: int) -> Any:
        if seed == 1:
            raise KeyboardInterrupt
        return with_test(build, seed)

    with pytest.raises(KeyboardInterrupt):
        roundoff.compare(train, MODES, 3, folder=tmp_path)
    assert [read_run(tmp_path / f"{label}-0").status for label in MODES] == ["finished"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {f"{label}-0" for label in MODES}
    roundoff.compare(with_test, MODES, 1, folder=tmp_path)  # nobody holds the folder


RETURNS: dict[str, tuple[Callable[[list[Any]], Any], list[float], float | None]] = {
    "floats": (lambda losses: [float(x) for x in losses], [0.5, 0.25], None),
    "tensors": (lambda losses: losses, [0.5, 0.25], None),
    "a tensor": (torch.stack, [0.5, 0.25], None),
    "a tuple of two": (tuple, [0.5, 0.25], None),
    "a pair": (lambda losses: (losses, torch.tensor(0.125)), [0.5, 0.25], 0.125),
    "a graph": (
        lambda losses: (torch.stack(losses) * torch.ones((), requires_grad=True), torch.ones(1, requires_grad=True)),
        [0.5, 0.25], 1.0,
    ),
    "a pair of a tensor": (lambda losses: (torch.stack(losses), 0.125), [0.5, 0.25], 0.125),
    "a test loss beyond fp32": (lambda losses: (losses, 1e300), [0.5, 0.25], math.inf),
    "a pair with None": (lambda losses: (losses, None), [0.5, 0.25], None),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", RETURNS)
def test_what_train_may_return(case: str) -> None:
    make, losses, test_loss = RETURNS[case]

    def train(build: Build, seed: int) -> Any:
        build(nn.Linear(1, 1), sgd)
        return make([torch.tensor(x) for x in losses])

    (run,) = roundoff.compare(train, ["fp32"], 1).comparison.modes[0].runs
    assert (run.steps["loss"], run.test_loss) == (losses, test_loss)


def one_more(build: Build, seed: int) -> list[float]:
    return [*untested(build, seed), 1.0]  # type: ignore[list-item]


def by_precision_with_seed_3(build: Build, seed: int) -> list[torch.Tensor] | list[float]:
    return untested(build, seed) if seed == 3 else [1.0] * STEPS


def never(build: Build, seed: int) -> Any:
    """A mistake that can be seen before is seen before: nobody waits for a training."""
    raise AssertionError


SHOULD = r"; return the losses of its steps, or a pair \(losses, test_loss\)$"
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": (lambda build, seed: None, {}, "train returned nothing" + SHOULD),
    "a number": (lambda build, seed: 5.0, {}, r"train returned 5\.0" + SHOULD),
    "no losses": (lambda build, seed: [], {}, "train returned no losses" + SHOULD),
    "texts": (lambda build, seed: ["x"], {}, r"train returned losses that are no numbers \(could not" + ".*" + SHOULD),
    "vectors": (lambda build, seed: [torch.ones(2)], {}, "train returned losses that are no numbers" + ".*" + SHOULD),
    "another length": (
        one_more, {}, r"train returned 21 losses, and precision\.step was called 20 times; return one loss for each",
    ),
    "steps by precision with one seed of two": (
        by_precision_with_seed_3, {"modes": ["masters-fp16"], "seeds": [2, 3]},
        r"^train called precision\.step in masters-fp16 with seed 3, and not with seed 2; step by precision with every "
        "seed, or with none$",
    ),
    "an unknown mode": (with_test, {"modes": ["fp32", "amp-fb16"]}, "'amp-fb16' is no stock mode; did you mean amp-"),
    "no modes": (with_test, {"modes": []}, r"modes is \[\]; give a list"),
    "no seeds": (with_test, {"seeds": 0}, "seeds=0: give their number, or a list of different whole numbers"),
    "a seed twice": (with_test, {"seeds": [1, 1]}, r"seeds=\[1, 1\]: give their number"),
    "a negative seed": (with_test, {"seeds": [-1]}, r"seeds=\[-1\]: give"),
    "seeds as a float": (with_test, {"seeds": 3.0}, r"seeds=3\.0: give their number, or a list of"),
    "seeds that are true": (with_test, {"seeds": True}, "seeds=True: give their number, or a list of"),
    "a seed that is true": (with_test, {"seeds": [True]}, r"seeds=\[True\]: give their number, or a list of"),
    "a seed in words": (with_test, {"seeds": "12"}, "seeds='12': give their number, or a list of"),
    "a test loss by name": (
        lambda build, seed: ([1.0], {"loss": 1.0}), {}, "train returned a test loss that is a dict" + SHOULD,
    ),
    "a test loss of two": (
        lambda build, seed: ([1.0], torch.ones(2)), {},
        r"train returned a test loss that is a tensor of shape \(2,\)" + SHOULD,
    ),
    "options": (never, {"job": argparse.Namespace(lr=1)}, r"job is a Namespace; give a mapping, such as vars\(args\)$"),
    "a set": (never, {"job": {"layers": {1}}}, r"job\.layers is a set; give a list$"),
    "a list": (never, {"job": [1]}, "job is a list; give a mapping$"),
    "a unit that is a number": (never, {"unit": 3}, "unit is 3; give a text, such as"),
    "a margin that is true": (with_test, {"margin": True}, "margin=True: give a number above 0"),
    "no margin": (with_test, {"margin": 0}, "margin=0: give a number above 0"),
    "an unknown reference": (with_test, {"reference": "manual"}, "reference='manual' is none of the modes; there"),
    "a file": (with_test, {"folder": __file__}, "folder=.*: cannot write there"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str) -> None:
    train, options, said = MISTAKES[case]
    with pytest.raises(UsageError, match=said) as error:
        roundoff.compare(train, **{"modes": MODES, "seeds": 1} | options)
    assert str(error.value).isprintable()


def test_numbers_of_numpy_are_numbers() -> None:
    given: dict[str, Any] = {"seeds": np.int64(2), "margin": np.float32(0.5)}
    comparison = roundoff.compare(with_test, ["fp32"], **given).comparison
    assert ([run.seed for run in comparison.modes[0].runs], comparison.margin) == ([0, 1], 0.5)
    given["seeds"] = np.arange(3, 5)
    comparison = roundoff.compare(with_test, ["fp32"], **given).comparison
    assert [run.seed for run in comparison.modes[0].runs] == [3, 4]


def test_labels_that_are_no_names_of_folders(tmp_path: Path) -> None:
    modes = {"../x/$y": "fp32", "..": "fp32"}
    report = roundoff.compare(with_test, modes, 1, folder=tmp_path / "runs")
    assert [mode.label for mode in report.comparison.modes] == ["../x/$y", ".."]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert report.comparison.modes[1].first_difference is None  # the same mode and seed


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own model")[2]
    names: dict[str, Any] = {
        "F": F,
        "model": nn.Linear(4, 3),
        "batches": [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(4)],
    }
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)  # noqa: S102
    assert list(names["report"].result["modes"]) == ["fp32", "masters-fp16", "amp-fp16", "amp-bf16"]
