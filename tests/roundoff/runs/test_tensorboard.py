"""--tensorboard: what TensorBoard's own reader finds in the event files is what the run directory holds."""

import errno
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lm
from programs import BATCHES, TINY, Programs, Run, read_run
from roundoff.runs.directory import RunDirectory
from runs import kill_at, outcome, resume

installed = importlib.util.find_spec("tensorboard") is not None
needed = pytest.mark.skipif(not installed, reason="the extra tensorboard is not installed")

TRAIN = ("loss", "ppl", "grad_norm", "loss_scale", "skipped", "lr", "tokens_per_second")
SCALARS = {*(f"train/{name}" for name in TRAIN), "valid/loss", "valid/ppl", "test/loss", "test/ppl"}


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def curve(events: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def fp32(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, float(np.float32(value))) for step, value in points]


def expected(run: Run, interval: int) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run that nobody interrupted, from its .jsonl files; without tokens_per_second."""
    curves: dict[str, list[tuple[int, float]]] = {f"train/{name}": [] for name in TRAIN[:-1]}
    for epoch in run.epochs:
        steps = [row for row in run.steps if row["epoch"] == epoch["epoch"]]
        for i in range(0, len(steps), interval):
            rows = steps[i : i + interval]
            norms = [row["grad_norm"] for row in rows if row["applied"]]
            loss = sum(row["loss"] for row in rows) / len(rows)
            values = (loss, math.exp(loss), sum(norms) / len(norms), rows[-1]["loss_scale"], len(rows) - len(norms))
            for name, value in zip(TRAIN, (*values, rows[-1]["lr"]), strict=False):
                curves[f"train/{name}"].append((rows[-1]["step"], value))
        for name in ("loss", "ppl"):
            point = (epoch["epoch"] * BATCHES, epoch[f"valid_{name}"])
            curves.setdefault(f"valid/{name}", []).append(point)
    for name in ("loss", "ppl"):
        curves[f"test/{name}"] = [(run.result["steps"], run.result[f"test_{name}"])]
    return {tag: fp32(points) for tag, points in curves.items()}


def check_curves(programs: Programs, run: Run, interval: int) -> Any:
    events = read(programs.folder / "run")
    assert set(events.Tags()["scalars"]) == SCALARS
    curves = expected(run, interval)
    assert {tag: curve(events, tag) for tag in curves} == curves
    rates = curve(events, "train/tokens_per_second")
    assert [step for step, _ in rates] == [step for step, _ in curves["train/loss"]]
    assert all(rate > 0 for _, rate in rates)
    return events


@needed
def test_the_curves_are_those_of_the_run_directory(programs):
    programs.spoil_gradients({3, 4, 20}, "decoder.bias")
    run = programs.train("main_amp", "--tensorboard", "--log-interval", "7", "--init-scale", "1024")
    assert sum(not row["applied"] for row in run.steps) == 3
    events = check_curves(programs, run, 7)
    assert curve(events, "train/skipped") == [(7, 2), (14, 0), (18, 0), (25, 1), (32, 0), (36, 0)]
    assert [scale for _, scale in curve(events, "train/loss_scale")] == [256, 256, 256, 128, 128, 128]
    assert run.config["options"]["tensorboard"] is True


@needed
def test_hyperparameters_with_the_final_perplexity(programs):
    from tensorboard.plugins.hparams import metadata

    run = programs.train("main", "--tensorboard", "--fp16", "--tied")
    content = {
        tag: metadata.parse_session_start_info_plugin_data(data) if "start" in tag else data
        for tag, data in read(programs.folder / "run").PluginTagToContent("hparams").items()
    }
    assert content.keys() == {
        metadata.EXPERIMENT_TAG,
        metadata.SESSION_START_INFO_TAG,
        metadata.SESSION_END_INFO_TAG,
    }
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == ["test/ppl"]
    start = content[metadata.SESSION_START_INFO_TAG].hparams
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()}
    chosen = {
        **run.config["job"],
        **run.config["precision"],
        "seed": 1111,
        "corpus": "corpus",
        "parameters": run.config["parameters"],
    }
    assert found == {name: value for name, value in chosen.items() if isinstance(value, bool | int | float | str)}
    told = {"mode": "manual", "dtype": "float16", "loss_scale": 128.0, "tied": True, "seed": 1111, "lr": 20.0}
    assert told.items() <= found.items()
    assert not {"save", "run_dir", "data_name", "device", "tensorboard"} & found.keys()


@needed
def test_a_run_of_another_job_has_its_loss_as_metric(tmp_path):
    """It has no perplexity, and no tokens."""
    from roundoff.runs.event_files import EventFiles

    with RunDirectory(tmp_path / "run", job={"lr": 0.5}, mode="bf16", listeners=[EventFiles()]) as run:
        run.step(2.0, lr=0.5, grad_norm=1.0)
        run.epoch(3.0)
        run.finish(test_loss=4.0)
    events = read(tmp_path / "run")
    names = {f"train/{name}" for name in ("loss", "grad_norm", "loss_scale", "skipped", "lr")}
    assert set(events.Tags()["scalars"]) == names | {"valid/loss", "test/loss"}
    assert [curve(events, f"{part}/loss") for part in ("train", "valid", "test")] == [[(1, 2)], [(1, 3)], [(1, 4)]]


@needed
@pytest.mark.parametrize(("interval", "kill"), [(3, 2), (3, 7), (3, 11), (1, 11), (3, BATCHES + 12)])
def test_a_resumed_run_goes_on_with_the_same_curves(programs, monkeypatch, interval, kill):
    """What was trained twice, after the checkpoint of every 6 steps, is there once."""
    flags = ("--tensorboard", "--log-interval", str(interval), "--checkpoint-interval", "6")
    kill_at(programs, kill, "main", *TINY, *flags)
    resume(programs, "main")
    assert len(list((programs.folder / "run").glob("*tfevents*"))) == 2
    check_curves(programs, read_run(programs.folder / "run"), interval)
    resume(programs, "main", "--epochs", "3")
    longer = expected(read_run(programs.folder / "run"), interval)
    events = read(programs.folder / "run")
    assert curve(events, "train/loss") == longer["train/loss"]
    assert curve(events, "valid/ppl") == longer["valid/ppl"]
    assert curve(events, "test/ppl")[-1:] == longer["test/ppl"]


@needed
def test_listening_changes_nothing(programs):
    programs.train("main", "--fp16")
    plain = outcome(programs.folder)
    assert not list((programs.folder / "run").glob("*tfevents*"))
    assert programs.run("main", *TINY, "--fp16", "--tensorboard", "--run-dir", "b", "--save", "b.pt").code == 0
    assert outcome(programs.folder, "b", "b.pt") == plain


@needed
def test_a_run_that_diverges_has_no_perplexity_and_no_end(programs):
    programs.spoil_gradients(set(range(1, 99)), "decoder.bias")
    done = programs.run("main", *TINY, "--tensorboard", "--log-interval", "2", "--max-skipped", "5")
    assert done.code == 1
    events = read(programs.folder / "run")
    assert [step for step, _ in curve(events, "train/skipped")] == [2, 4]
    assert math.isnan(curve(events, "train/grad_norm")[0][1])
    assert set(events.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert not {"test/ppl", "valid/ppl"} & set(events.Tags()["scalars"])


@needed
def test_a_full_disk_is_one_line(programs, monkeypatch):
    import roundoff.runs.event_files

    calls = 0

    class Full(roundoff.runs.event_files.RecordWriter):
        def write(self, data: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(data)

    monkeypatch.setattr(roundoff.runs.event_files, "RecordWriter", Full)
    done = programs.run("main", *TINY, "--tensorboard", "--log-interval", "2")
    assert done.code == 1
    assert done.err.startswith("error: cannot write run/events.out.tfevents.000000 (No space left on device)")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("missing", ["tensorboard", "google.protobuf"])
def test_without_the_package_a_line_says_how_to_install_it(programs, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] in ("tensorboard", "google")]:
        monkeypatch.delitem(sys.modules, name)  # so that it is imported anew
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "roundoff.runs.event_files", raising=False)
    monkeypatch.delattr(lm, "tensorboard", raising=False)
    assert "pip install 'roundoff[tensorboard]'" in programs.refuse("main", *TINY, "--tensorboard")
