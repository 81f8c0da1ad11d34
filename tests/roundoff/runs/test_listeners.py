"""Whoever listens hears what the run directory holds, an interval at a time."""

import math
from pathlib import Path
from typing import Any

import pytest

from programs import BATCHES, TINY
from roundoff.runs.listeners import listening
from runs import kill_at


class Heard:
    def __init__(self) -> None:
        self.starts: list[tuple[Path, dict[str, Any], int]] = []
        self.intervals: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        self.starts.append((directory, config, step))

    def interval(self, row: dict[str, Any]) -> None:
        self.intervals.append(row)

    def epoch(self, row: dict[str, Any]) -> None:
        self.epochs.append(row)

    def result(self, row: dict[str, Any]) -> None:
        self.results.append(row)


def test_all_that_is_recorded_is_heard(programs):
    """Checkpoints and skipped steps fetch the rows more often than once an interval; the last one of an epoch is
    shorter."""
    programs.spoil_gradients({3, 4}, "decoder.bias")
    heard = Heard()
    with listening(heard):
        run = programs.train("main", "--log-interval", "7", "--checkpoint-interval", "4", "--fp16")
    ((directory, config, step),) = heard.starts
    assert (directory, step) == (Path("run"), 0)
    assert (config["mode"], config["environment"], config["epochs"]) == ("fp16", run.config["environment"], 2)

    ends = [7, 14, BATCHES, BATCHES + 7, BATCHES + 14, 2 * BATCHES]
    assert [row["step"] for row in heard.intervals] == ends
    for row, first, end in zip(heard.intervals, [0, *ends], ends, strict=False):
        steps = run.steps[first:end]
        norms = [step["grad_norm"] for step in steps if step["applied"]]
        loss = sum(step["loss"] for step in steps) / len(steps)
        assert row.pop("tokens_per_second") > 0
        assert row == {
            "step": end,
            "epoch": steps[-1]["epoch"],
            "lr": steps[-1]["lr"],
            "loss": loss,
            "ppl": math.exp(loss),
            "grad_norm": sum(norms) / len(norms),
            "loss_scale": steps[-1]["loss_scale"],
            "skipped": len(steps) - len(norms),
        }
    assert [row["skipped"] for row in heard.intervals] == [2, 0, 0, 0, 0, 0]
    counts = [{"step": BATCHES}, {"step": 2 * BATCHES}]
    assert heard.epochs == [row | count for row, count in zip(run.epochs, counts, strict=True)]
    assert heard.results == [run.result]

    assert programs.run("main", *TINY, "--run-dir", "unheard").code == 0
    assert len(heard.results) == 1


def test_an_interval_without_one_applied_step_has_no_norm(programs):
    programs.spoil_gradients({1, 2, 3}, "decoder.bias")
    heard = Heard()
    with listening(heard):
        programs.train("main", "--log-interval", "3", "--fp16", "--max-steps", "6")
    assert [row["skipped"] for row in heard.intervals] == [3, 0]
    assert math.isnan(heard.intervals[0]["grad_norm"])
    assert math.isfinite(heard.intervals[1]["grad_norm"])


@pytest.mark.parametrize("kill", [2, BATCHES + 3])
def test_a_resumed_run_says_after_which_step_it_goes_on(programs, monkeypatch, kill):
    kill_at(programs, kill, "main", *TINY)
    heard = Heard()
    with listening(heard):
        assert programs.run("main", "--resume", "run").code == 0
    assert [(directory, step) for directory, _, step in heard.starts] == [(Path("run"), kill // BATCHES * BATCHES)]
    assert heard.intervals[0]["epoch"] == 1 + kill // BATCHES
    assert heard.results[0]["steps"] == 2 * BATCHES
