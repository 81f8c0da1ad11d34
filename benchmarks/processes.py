"""What needs a process of its own: peak memory, and the time from its start to the first training step."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import reference
from benchmarks.gpu.packages import ROOT, python_path
from benchmarks.measure import REFERENCE, Row, compared
from lm.data import corpora
from lm.data.corpus import batchify
from lm.options.modes import MODES
from lm.options.options import words
from roundoff.device import peak_memory_bytes

Result = TypeVar("Result")

STEPS = 5  # of the part memory
EVALUATION_LINES = 100  # of the text for evaluation: its memory shows in the first batches

FIRST_STEP = """
import os, runpy, sys, time
from roundoff.runs.directory import RunDirectory
def done(*_, **__):
    print(time.time(), flush=True)
    os._exit(0)
RunDirectory.step = done
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script to the end of its first step, and prints that moment."""


@contextmanager
def short_evaluation(data: str) -> Iterator[str]:
    """Make a folder with the training text of `data` and the first lines of the other two."""
    texts = corpora.read(data)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.txt").write_text(texts.train, encoding="utf-8")
        for split in ("valid", "test"):
            lines = getattr(texts, split).splitlines(keepends=True)[:EVALUATION_LINES]
            Path(folder, f"{split}.txt").write_text("".join(lines), encoding="utf-8")
        yield folder


def python(*arguments: str, threads: int | None = None) -> str:
    """Run a fresh Python process, with `threads` threads of torch or as many as it chooses, and return its stdout.

    It keeps bytecode, as Python does for users, even where the environment forbids it.
    """
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": python_path(), "PYTHONDONTWRITEBYTECODE": ""}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def fresh(function: Callable[..., Result], *arguments: object) -> Result:
    """Return what `function` returns in a fresh process, with as many threads of torch as this one."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, [torch.get_num_threads()]) as process:
        result = process.apply(function, arguments)
        process.close()
        process.join()  # else it would be killed, and not clear up after itself
        return result


def flags(mode: str, data: str, size: int, folder: str, device: str = "cpu") -> list[str]:
    """Return script and flags of `mode` on `device`, with its results in `folder`."""
    where = {"run_dir": f"{folder}/run", "save": f"{folder}/model.safetensors", "device": device}
    options = {**MODES[mode].options, "data": data, "emsize": size, "nhid": size, **where}
    return [f"{MODES[mode].script}.py", *words(options)]


def measure_memory(
    data: str, size: int, modes: list[str], rounds: int, device: str = "cpu", steps: int = STEPS
) -> list[Row]:
    """Measure the peak memory of a process that trains for `steps` batches and evaluates.

    On a CPU that is what the process holds, on a GPU what torch holds there.
    """
    peaks: dict[str, list[float]] = {name: [] for name in (REFERENCE, *modes)}
    with short_evaluation(data) as short:
        call = "from benchmarks.processes import train_reference; train_reference"
        call += f"({short!r}, {size}, {device!r}, {steps})"
        for _ in range(rounds):
            peaks[REFERENCE].append(float(python("-c", call)) / 2**20)
            for mode in modes:
                with tempfile.TemporaryDirectory() as folder:
                    python(*flags(mode, short, size, folder, device), "--max-steps", str(steps))
                    result = json.loads(Path(folder, "run", "result.json").read_text())
                    peaks[mode].append(result["peak_memory_bytes"] / 2**20)
    return [row | {"unit": "MiB", "steps": steps} for row in compared("memory", size, peaks, faster=False)]


def train_reference(data: str, size: int, device: str, steps: int) -> None:
    """Train and evaluate as `measure_memory` has the trainers do, and print the peak memory in bytes."""
    (train, valid, test), vocabulary = reference.read(data)
    job = reference.Trainer(batchify(train, 20, device), (vocabulary + 7) // 8 * 8, size)
    for i in range(steps):
        job.step(i * job.bptt)
    for text in (valid, test):
        job.evaluate(batchify(text, 10, device))
    print(peak_memory_bytes(device))


def measure_start(data: str, size: int, modes: list[str], rounds: int) -> list[Row]:
    """Measure the seconds from the start of a process to the end of its first training step."""
    rows = []
    for mode in modes:
        taken = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                start = time.time()
                code = f"import sys; sys.argv.pop(0){FIRST_STEP}"
                taken.append(float(python("-c", code, *flags(mode, data, size, folder)).split()[-1]) - start)
        rows.append({"part": "start", "size": size, "name": mode, "value": min(taken), "unit": "s", "all": taken})
    return rows
