"""`python -m benchmarks` and its `growth`: each part at a tiny size, and what is made of known times.

What has a process of its own when it is measured stays in this one here.
"""

import json
import runpy
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs
from benchmarks import against_reference, help_cost, probe_cost, processes, several, training
from benchmarks.growth import command, comparing, picture, probing
from benchmarks.growth import training as growing
from lm.data import corpora
from programs import ROOT
from roundoff.errors import UsageError
from roundoff.report import compare_command
from roundoff.runs.reading import read_run


class Beside:
    """Stands for `benchmarks.beside.Beside`, without the process."""

    def __init__(self, stack: ExitStack, make: Any, device: str, *arguments: Any) -> None:
        self._calls = make(stack, device, *arguments)

    def call(self, name: str) -> Any:
        return self._calls[name]


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training, growing):
        monkeypatch.setattr(module, "Beside", Beside)
    for module in (probe_cost, comparing, probing):
        monkeypatch.setattr(module, "fresh", lambda function, *arguments: function(*arguments))


def test_every_row_of_the_table_of_aims(in_one_process, monkeypatch, tmp_path, corpus) -> None:
    speeds = iter([[1.0, 100.0, 110.0, 90.0], [1.0, 80.0, 95.0, 97.0]])

    def python(*words: str, threads: int | None = None) -> str:
        """Start no process; leave the speeds of one that would train."""
        if "benchmarks.several" in words:
            Path(words[words.index("benchmarks.several") + 1]).write_text(json.dumps(next(speeds)))
        return ""

    for module in (help_cost, several):
        monkeypatch.setattr(module, "python", python)
    monkeypatch.setattr(probe_cost, "BATCHES", 3)
    words = "step precision probe help processes --sizes 8 --rounds 1 --modes fp32 fp16-optimizer --json"
    monkeypatch.setattr(sys, "argv", ["", *words.split(), str(tmp_path / "results.json"), "--data", str(corpus)])
    assert against_reference.main() == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    rows = {f"{row['part']}: {row['name']}": row for row in results}
    assert {name: row["ratio_is"] for name, row in rows.items() if "ratio" in row} == {
        "step: fp32": "reference / ours",
        "step: fp16-optimizer": "reference / ours",
        "half step: fp16-optimizer": "our fp32 / ours",
        "precision: fp32": "ours / reference",
        "precision: fp16-optimizer": "ours / reference",
        "precision: loop, new gradients": "ours / reference",
        "precision: loop, kept gradients": "ours / reference",
        "precision: FP16_Optimizer, loop, new gradients": "ours / loop",
        "precision: FP16_Optimizer, loop, kept gradients": "ours / loop",
        "probe: 3 batches, 5 modes": "probe / as many fp32 steps",
        "help: main.py --help": "ours / import torch",
        "help: compare.py --help": "ours / import torch",
        "help: probe.py --help": "ours / import torch",
        "processes: 2 processes": "several processes / one",
    }
    assert {name for name, row in rows.items() if "ratio" not in row} == {
        "probe: 3 batches, 5 modes, shortest",
        "help: import torch, shortest",
        *(f"help: {name}.py --help, shortest" for name in ("main", "compare", "probe")),
    }
    assert all(row["ratio"]["min"] > 0 for row in results if "ratio" in row)
    assert rows["processes: 2 processes"]["ratio"]["median"] == 0.95  # of the medians without the first interval


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["name"]: row["ratio"]["median"] if "ratio" in row else row["value"] for row in rows}


def test_ratios_of_known_times() -> None:
    times = {"reference": [1.0, 2.0], "manual": [1.0, 1.0], "loop, new": [4.0, 8.0], "loop, kept": [1.0, 2.0]}
    assert training.against_fp32(8, times) == training.against_loops(8, times) == []
    times |= {"fp32": [0.5, 0.5], "fp16-optimizer": [2.0, 4.0]}
    assert medians(training.against_fp32(8, times)) == {"manual": 0.5, "fp16-optimizer": (0.25 + 0.125) / 2}
    assert medians(training.against_loops(8, times)) == {
        "FP16_Optimizer, loop, new": 0.5,
        "FP16_Optimizer, loop, kept": 2.0,
    }
    assert medians(help_cost.rows_of_help({"reference": [2.0, 1.0], "main.py --help": [3.0, 2.0]})) == {
        "main.py --help": 1.75,
        "import torch, shortest": 1.0,
        "main.py --help, shortest": 2.0,
    }
    assert medians(probe_cost.rows_of_probe(8, {"reference": [7.0, 7.0], "probe": [70.0, 84.0]})) == {
        "32 batches, 5 modes": 11.0,
        "32 batches, 5 modes, shortest": 70.0,
    }


def test_the_speeds_of_a_run_are_those_of_its_intervals(monkeypatch, tmp_path, corpus) -> None:
    """`python -m benchmarks.several FILE main.py FLAGS...`"""
    file = tmp_path / "speeds.json"
    script, *flags = processes.flags("fp32", str(corpus), 8, str(tmp_path))
    words = [str(file), str(ROOT / script), *flags, "--log-interval", "2", "--max-steps", "4"]
    monkeypatch.setattr(sys, "argv", ["several.py", *words])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "benchmarks" / "several.py"), run_name="__main__")
    speeds = json.loads(file.read_text())
    assert len(speeds) == 2
    assert min(speeds) > 0


@pytest.mark.slow
def test_two_processes_and_one(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(several, "INTERVAL", 3)
    data = jobs.write_corpus(tmp_path / "corpus", lines=3000)
    (row,) = several.measure_processes(str(data), 8, rounds=1)
    assert row["ratio"]["median"] == row["ours"]["median"] / row["reference"]["median"] > 0


GROWN = {"layers": (1, 2), "compare-steps": (25,), "probe-mlp": (16,), "probe-lm": (8,)}


@pytest.fixture
def tiny(in_one_process, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    """Small values for some axes of growth."""
    monkeypatch.setattr(growing, "Sizes", partial(growing.Sizes, vocabulary=16, hidden=8, batch=2, layers=1))
    monkeypatch.setattr(growing, "BPTT", 3)
    monkeypatch.setattr(comparing, "WRITTEN", 10)
    monkeypatch.setattr(corpora, "DEFAULT", str(corpus))
    for name, values in GROWN.items():
        monkeypatch.setitem(command.AXES, name, replace(command.AXES[name], values=values))


def test_growth(tiny, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(compare_command, "write_files", lambda folder, comparison: None)  # it takes a second
    assert command.main([*GROWN, "--json", str(tmp_path / "growth.json")]) == 0
    rows = json.loads((tmp_path / "growth.json").read_text())["results"]
    trained = ("reference", "fp32", "amp-bf16")
    names = {"compare-steps": ("compare",), "probe-mlp": ("probe",), "probe-lm": ("probe",)}
    assert [(row["axis"], row["at"], row["name"]) for row in rows] == [
        (axis, at, name) for axis, values in GROWN.items() for at in values for name in names.get(axis, trained)
    ]
    assert all(row["seconds"]["min"] > 0 and row["mib"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


GROWTH_MISTAKES = {
    "layers size": "there is no axis 'size'; choose from vocabulary, hidden, batch, ",
    "layers --json nowhere/x.json": "'nowhere/x.json' is in no folder that is there; make 'nowhere' first",
    "layers --picture nowhere/x.png": "'nowhere/x.png' is in no folder that is there; make 'nowhere' first",
    "--read nowhere.json": "there is no file 'nowhere.json'; give one that --json has written",
}


@pytest.mark.parametrize("words", GROWTH_MISTAKES)
def test_a_mistake_is_said_before_anything_is_measured(words) -> None:
    with pytest.raises(UsageError, match=GROWTH_MISTAKES[words]):
        command.main(words.split())


@pytest.mark.slow
def test_growth_is_drawn_now_or_later(tiny, tmp_path) -> None:
    file, now, later = (tmp_path / name for name in ("growth.json", "now.png", "later.png"))
    assert command.main(["layers", "compare-steps", "--json", str(file), "--picture", str(now)]) == 0
    assert command.main(["--read", str(file), "--picture", str(later)]) == 0
    assert now.read_bytes().startswith(b"\x89PNG")
    assert now.read_bytes() == later.read_bytes()


def test_the_panels_of_growth() -> None:
    """Time over memory over all else; a line of panels has one scale; what was not measured is empty."""
    figures = {("layers", "fp32", 1): 0.5, ("layers", "fp32", 8): 2.0, ("batch", "reference", 5): 6.0}
    figures |= {("compare-runs", "compare", 2): 30.0}
    rows = [
        {"axis": axis, "at": at, "name": name, "seconds": {"median": seconds}, "mib": 1000 * seconds}
        for (axis, name, at), seconds in figures.items()
    ]
    grid = picture.panels(command.AXES, rows)
    assert [[panel.title for panel in line] for line in grid] == [
        ["vocabulary", "hidden", "batch", "layers"],
        ["vocabulary", "hidden", "batch", "layers"],
        ["compare-steps", "compare-runs", "probe-mlp", "probe-lm"],
    ]
    drawn = {panel.id: [(c.name, c.x.tolist(), c.y.tolist()) for c in panel.items] for line in grid for panel in line}
    assert {id: curves for id, curves in drawn.items() if curves} == {
        "batch-seconds": [("reference", [5.0], [6.0])],
        "layers-seconds": [("fp32", [1.0, 8.0], [0.5, 2.0])],
        "batch-mib": [("reference", [5.0], [6000.0])],
        "layers-mib": [("fp32", [1.0, 8.0], [500.0, 2000.0])],
        "compare-runs-seconds": [("compare", [2.0], [30.0])],
    }
    assert [{panel.y.span for panel in line} for line in grid] == [
        {(0.5 / 1.2, 6.0 * 1.2)},
        {(500 / 1.2, 6000 * 1.2)},
        {(30 / 1.2, 30 * 1.2)},
    ]
    assert grid[0][3].x.span == (1 / 1.2, 8 * 1.2)  # that of all values, measured or not
    assert [[panel.y.label for panel in line] for line in grid] == [
        ["seconds a step", "", "", ""],
        ["peak memory, MiB", "", "", ""],
        ["seconds", "", "", ""],
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((), []),
        ((1, 2, 4, 8), ["1", "2", "4", "8"]),
        ((1_000, 1_000_000), ["1k", "10k", "100k", "1M"]),
        ((90, 1_600), ["100", "300", "1k"]),
        ((0.04, 0.9), ["0.05", "0.1", "0.2", "0.5"]),
        ((0.08, 0.5), ["0.1", "0.2", "0.5"]),
    ],
)
def test_ticks(values, expected) -> None:
    assert [tick.text for tick in picture.ticks(values)] == expected


def test_a_run_that_repeats_its_steps_is_a_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(comparing, "WRITTEN", 10)
    comparing.write_run(tmp_path / "amp-bf16-3", 25)
    run = read_run(tmp_path / "amp-bf16-3")
    assert (run.label, run.seed, run.status, run.problems) == ("amp-bf16", 3, "finished", [])
    assert run.steps["step"] == list(range(1, 26))
    assert run.steps["loss"] == (3 * run.steps["loss"][:10])[:25]
    assert len(set(run.steps["loss"])) == 10


def test_random_text_obeys_zipf() -> None:
    text = growing.RandomText(1000, 100_000)
    counts = np.bincount(text.train.numpy())
    assert (text.vocab_size, len(text.train)) == (1000, 100_000)
    assert 900 < len(counts) < 1000  # rare words are there, none is beyond the vocabulary
    for word in (0, 1, 9):
        share = np.log1p(1 / (word + 1)) / np.log(1000)  # the k-th word's: the integral of 1/k from k to k + 1
        assert counts[word] / 100_000 == pytest.approx(share, rel=0.05)
