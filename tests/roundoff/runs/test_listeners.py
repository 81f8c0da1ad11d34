"""Whoever listens hears what the run directory holds, an interval at a time; the terminal is one of them."""

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from programs import BATCHES, TINY, read_run
from roundoff.runs.directory import RunDirectory
from roundoff.runs.listeners import Listener, listening
from roundoff.runs.meter import curves
from roundoff.runs.reading import perplexity
from roundoff.terminal import Terminal
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


def summary(steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What a listener should hear of these rows of steps.jsonl, but for times."""
    norms = [step["grad_norm"] for step in steps if step["applied"]]
    loss = sum(step["loss"] for step in steps) / len(steps)
    return {
        "step": steps[-1]["step"],
        "epoch": steps[-1]["epoch"],
        "lr": steps[-1]["lr"],
        "loss_scale": steps[-1]["loss_scale"],
        "loss": loss,
        "ppl": math.exp(loss),
        "grad_norm": sum(norms) / len(norms),
        "skipped": len(steps) - len(norms),
    } | more


def test_all_that_is_recorded_is_heard(programs):
    """Checkpoints and skipped steps fetch the rows more often than once an interval; the last one of an epoch is
    shorter, and has no line on the terminal."""
    programs.spoil_gradients({3, 4}, "decoder.bias")
    heard = Heard()
    with listening(heard):
        run = programs.train("main", "--log-interval", "7", "--checkpoint-interval", "4", "--fp16")
    ((directory, config, step),) = heard.starts
    assert (directory, step) == (Path("run"), 0)
    assert (config["precision"]["mode"], config["job"]["epochs"]) == ("manual", 2)
    assert config["environment"] == run.config["environment"]

    ends = [7, 14, BATCHES, BATCHES + 7, BATCHES + 14, 2 * BATCHES]
    for row, first, end in zip(heard.intervals, [0, *ends], ends, strict=False):
        assert row.pop("tokens_per_second") > 0
        assert row.pop("ms_per_batch") > 0
        assert row == summary(run.steps[first:end], batch=(end - 1) % BATCHES + 1, batches=BATCHES)
    assert [row["step"] for row in heard.intervals] == ends
    assert [row["skipped"] for row in heard.intervals] == [2, 0, 0, 0, 0, 0]
    counts = [{"step": BATCHES}, {"step": 2 * BATCHES}]
    assert heard.epochs == [row | count for row, count in zip(run.epochs, counts, strict=True)]
    assert heard.results == [run.result]

    lines = [line for line in run.out.splitlines() if "/   18 batches | lr 20.00 | ms/batch " in line]
    assert [line.partition("/")[0] for line in lines] == [f"| epoch   {e} | {b:5d}" for e in (1, 2) for b in (7, 14)]
    assert ["skipped 2 | loss scale 128" in line for line in lines] == [True, False, False, False]

    assert programs.run("main", *TINY, "--run-dir", "unheard").code == 0
    assert len(heard.results) == 1


@pytest.mark.parametrize("kill", [2, BATCHES + 3])
def test_a_resumed_run_says_after_which_step_it_goes_on(programs, monkeypatch, kill):
    kill_at(programs, kill, "main", *TINY)
    heard = Heard()
    with listening(heard):
        assert programs.run("main", "--resume", "run").code == 0
    assert [(directory, step) for directory, _, step in heard.starts] == [(Path("run"), kill // BATCHES * BATCHES)]
    assert heard.intervals[0]["epoch"] == 1 + kill // BATCHES
    assert heard.results[0]["steps"] == 2 * BATCHES


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time of day in seconds, which a test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_figures_of_an_interval(tmp_path, clock):
    """Exactly its own steps count, and its own time: none of the validation's."""
    heard = Heard()
    run = RunDirectory(tmp_path / "run", mode="fp32", listeners=[heard], interval=None)
    run.start()
    run.begin_interval()
    for seconds, losses, applied in [(2.0, (1.0, 2.0, 6.0), (1, 0, 1)), (1.0, (8.0,), (0,)), (0.0, (7.0,), (1,))]:
        for loss, good in zip(losses, applied, strict=True):
            run.step(loss, grad_norm=2 * loss, loss_scale=loss, applied=bool(good), lr=0.5, tokens=10)
            run.flush()
        clock[0] += seconds
        run.end_interval()
        run.end_interval()  # of no step: nobody hears of it
        clock[0] += 50
        run.begin_interval()
    told = [(row["step"], row["loss"], row["grad_norm"], row["loss_scale"], row["skipped"]) for row in heard.intervals]
    assert told[0] == (3, 3.0, 7.0, 6.0, 1)
    assert told[1][:2] + told[1][3:] == (4, 8.0, 8.0, 1)
    assert math.isnan(told[1][2])  # no step of it was applied
    assert told[2] == (5, 7.0, 14.0, 7.0, 0)
    assert [row["ms_per_batch"] for row in heard.intervals] == [pytest.approx(2000 / 3), 1000, 0]
    assert [row["tokens_per_second"] for row in heard.intervals[:2]] == [15, 10]
    assert math.isnan(heard.intervals[2]["tokens_per_second"])
    assert all("ppl" not in row for row in heard.intervals)


def test_a_loop_that_ends_no_interval_itself(tmp_path):
    """Each third step does, an epoch and the end; without tokens there is no rate."""
    heard = Heard()
    with RunDirectory(tmp_path / "run", mode="fp32", listeners=[heard], interval=3) as run:
        for epoch_steps in (4, 1):
            for _ in range(epoch_steps):
                run.step(1.0)
            run.epoch(2.0)
        run.step(1.0)
        run.step(1.0)
        run.finish()
    assert [row["step"] for row in heard.intervals] == [3, 4, 5, 6, 7]
    assert [row["step"] for row in heard.epochs] == [4, 5]
    assert [row["status"] for row in heard.results] == ["finished"]
    assert "tokens_per_second" not in heard.intervals[0]
    assert set(curves(heard.intervals[0])) == {"lr", "loss_scale", "loss", "skipped"}  # and no norm that nobody knows


class TrackerError(Exception):
    """A tracker that cannot be reached."""


class Failing(Heard):
    """Raises whenever one of `events` comes."""

    def __init__(self, *events: str) -> None:
        super().__init__()
        self.events = events

    def start(self, *rest: Any) -> None:
        super().start(*rest)
        self.fail("start")

    def interval(self, row: dict[str, Any]) -> None:
        super().interval(row)
        self.fail("interval")

    def epoch(self, row: dict[str, Any]) -> None:
        super().epoch(row)
        self.fail("epoch")

    def result(self, row: dict[str, Any]) -> None:
        super().result(row)
        self.fail("result")

    def fail(self, event: str) -> None:
        if event in self.events:
            raise TrackerError(event)


def two_epochs(path: Path, *listeners: Heard) -> None:
    with RunDirectory(path, listeners=listeners, interval=2) as run:
        for _ in range(2):
            for _ in range(3):
                run.step(1.0)
            run.epoch(2.0)
        run.finish(test_loss=0.5)


def one_step(path: Path, *events: str, error: Exception | None = None, finish: bool = False) -> None:
    with RunDirectory(path, listeners=[Failing(*events)]) as run:
        run.step(1.0)
        if error is not None:
            raise error
        if finish:
            run.finish(test_loss=0.5)


COSTS = {
    ("start",): (0, 0, "interrupted"),
    ("interval",): (2, 0, "interrupted"),
    ("epoch",): (3, 1, "interrupted"),
    ("result",): (6, 2, "finished"),
    ("interval", "epoch", "result"): (2, 0, "interrupted"),
}
"""What is in the record: steps, epochs, status."""


@pytest.mark.parametrize("events", COSTS)
def test_a_listener_that_raises_costs_nothing_that_came_before(tmp_path, events):
    """One error, that of the event, with a note. The other listener hears what the record holds."""
    steps, epochs, status = COSTS[events]
    failing, other = Failing(*events), Heard()
    with pytest.raises(TrackerError) as caught:
        two_epochs(tmp_path / "run", failing, other)
    note = f"The listener Failing raised this in `{events[0]}`. The record in {tmp_path / 'run'} is whole."
    assert (str(caught.value), caught.value.__notes__, caught.value.__context__) == (events[0], [note], None)
    assert len(other.starts) == 1
    RunDirectory(tmp_path / "run", resume=True).close()  # nobody holds it
    if events == ("start",):
        return
    run = read_run(tmp_path / "run")
    assert (len(run.steps), len(run.epochs), run.result["status"]) == (steps, epochs, status)
    assert (other.results, other.intervals[-1]["step"]) == ([run.result], steps)
    assert len(other.epochs) == epochs


@pytest.mark.parametrize("events", [("interval",), ("result",), ("interval", "result")])
def test_the_end_of_a_run_is_recorded_though_a_listener_raises(tmp_path, events):
    """As what it is. The error of the loop, if there is one, is the only one."""
    with pytest.raises(TrackerError):
        one_step(tmp_path / "a", *events)
    with pytest.raises(TrackerError):
        one_step(tmp_path / "b", *events, finish=True)
    with pytest.raises(ZeroDivisionError) as caught:
        one_step(tmp_path / "c", *events, error=ZeroDivisionError())
    assert caught.value.__context__ is None
    runs = [read_run(tmp_path / name) for name in "abc"]
    assert [len(run.steps) for run in runs] == [1, 1, 1]
    assert [run.result["status"] for run in runs] == ["interrupted", "finished", "interrupted"]
    assert [run.result["test_loss"] for run in runs] == [None, 0.5, None]


def test_a_loop_may_go_on_after_a_listener_has_failed(tmp_path):
    failing = Failing("interval")
    with RunDirectory(tmp_path, listeners=[failing], interval=1) as run:
        for _ in range(3):
            with suppress(TrackerError):
                run.step(1.0)
        run.finish()
    assert [row["step"] for row in failing.intervals] == [1, 2, 3]
    assert (len(read_run(tmp_path).steps), len(failing.results)) == (3, 1)


def test_the_runs_own_listeners_hear_before_those_around(tmp_path):
    order: list[str] = []

    class Named(Listener):
        def __init__(self, name: str) -> None:
            self.name = name

        def result(self, row: dict[str, Any]) -> None:
            order.append(self.name)

    with listening(Named("around")), RunDirectory(tmp_path, listeners=[Named("own")]) as run:
        run.finish()
    assert order == ["own", "around"]


def test_the_terminal_shows_the_test_though_the_event_files_fail(programs, monkeypatch):
    """A full disk hides no result."""

    def full(self: object, row: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device", "events")

    monkeypatch.setattr("lm.training.run_start.event_files", lambda: type("Full", (Heard,), {"result": full})())
    done = programs.run("main", *TINY, "--tensorboard")
    assert (done.code, "| End of training | test loss" in done.out) == (1, True)
    assert read_run(programs.folder / "run").result["status"] == "finished"


ROW = {"step": 40, "epoch": 2, "lr": 20.0, "loss_scale": 128.0, "loss": 5.678, "skipped": 0, "ms_per_batch": 12.345}
LINE, DOUBLE = "-" * 89, "=" * 89


@pytest.mark.parametrize(
    ("event", "row", "printed"),
    [
        (
            "interval",
            ROW | {"batch": 10, "batches": 2983, "ppl": 292.3},
            ["| epoch   2 |    10/ 2983 batches | lr 20.00 | ms/batch 12.35 | loss  5.68 | ppl   292.30"],
        ),
        (
            "interval",
            ROW | {"batch": 10, "batches": 2983, "ppl": math.inf, "lr": 0.0012345, "skipped": 3},
            [
                "| epoch   2 |    10/ 2983 batches | lr 0.0012 | ms/batch 12.35 | loss  5.68 | ppl      inf"
                " | skipped 3 | loss scale 128"
            ],
        ),
        ("interval", ROW | {"batch": 11, "batches": 2983, "ppl": 1.0}, []),  # no multiple of 5
        ("interval", ROW, ["| epoch   2 | step      40 | lr 20.00 | ms/batch 12.35 | loss  5.68"]),
        (
            "epoch",
            {"epoch": 1, "seconds": 3.456, "valid_loss": 5.0, "valid_ppl": 148.41},
            [LINE, "| end of epoch   1 | time:  3.46s | valid loss  5.00 | valid ppl   148.41", LINE],
        ),
        (
            "epoch",
            {"epoch": 1, "seconds": 3.456, "valid_loss": 5.0},
            [LINE, "| end of epoch   1 | time:  3.46s | valid loss  5.00", LINE],
        ),
        (
            "result",
            {"test_loss": 5.68, "test_ppl": 291.62},
            [DOUBLE, "| End of training | test loss  5.68 | test ppl   291.62", DOUBLE],
        ),
        ("result", {"test_loss": None, "test_ppl": None}, []),
    ],
)
def test_what_the_terminal_shows(capsys, event, row, printed):
    getattr(Terminal(5), event)(row)
    assert capsys.readouterr().out.splitlines() == printed


def test_derived_figures_are_beside_each_loss(tmp_path):
    heard = Heard()
    derived = {"ppl": perplexity, "bits": lambda loss: loss / math.log(2)}
    with RunDirectory(tmp_path / "run", mode="fp32", listeners=[heard], derived=derived) as run:
        run.step(math.log(4))
        run.epoch(math.log(2))
        run.finish(test_loss=0.0)
    (interval,), (epoch,), (result,) = heard.intervals, heard.epochs, heard.results
    assert (interval["ppl"], interval["bits"]) == (pytest.approx(4), pytest.approx(2))
    assert (epoch["valid_ppl"], epoch["valid_bits"]) == (pytest.approx(2), pytest.approx(1))
    assert (result["test_ppl"], result["test_bits"]) == (1.0, 0.0)
