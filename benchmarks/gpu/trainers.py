"""The trainers as a user starts them, each run in a process of its own.

A server imports torch once and forks the processes, which spares seconds a run. Where a forked process cannot use the
GPU, each run starts from nothing.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.packages import ROOT, python_path
from benchmarks.gpu.settings import Settings
from roundoff.errors import RunError

SECONDS = 150
"""The longest that a run may take."""
START_SECONDS = 60
"""The longest that the server may take to start, and to fork a process that uses the GPU."""
AT_ONCE = 4
"""Runs at a time on a GPU, where their speed does not matter."""
SMALL = ("--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "5")


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        directory: its --run-dir; without the checkpoints, unless it was killed.
        model: digest of what --save wrote; "" if it was killed.
        seconds: that it took, from the start of its process.
    """

    directory: Path
    model: str
    seconds: float

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return _object(self.directory / "config.json")

    def result(self) -> dict[str, Any]:
        """Return result.json."""
        return _object(self.directory / "result.json")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of steps.jsonl or epochs.jsonl."""
        return [json.loads(line) for line in (self.directory / name).read_text(encoding="utf-8").splitlines()]


def _object(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


class Trainers:
    """Starts trainers on one device and one corpus.

    Attributes:
        method: how processes are started: "forkserver", or "spawn" where a forked one cannot use the device.

    Args:
        settings: of the part.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = Path(tempfile.mkdtemp(dir=settings.scratch))
        self._context: Any = self._forking()
        self.method: str = self._context.get_start_method()

    def _forking(self) -> Any:
        """Return a context of multiprocessing that starts processes here; the server's, if it can."""
        os.environ["PYTHONPATH"] = python_path()  # the server's only way to find what it imports in advance
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # or an import may start CUDA, which no fork survives
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "lm.launch.entry", "lm.training.loop"])
        process = context.Process(target=_try, args=(self._settings.device,))
        process.start()
        process.join(START_SECONDS)
        if process.exitcode == 0:
            return context
        process.kill()
        return multiprocessing.get_context("spawn")

    def train(self, name: str, script: str, *words: str, die: bool = False) -> Run:
        """Run `script` to its end, or with `die` until it has killed itself after its first checkpoint.

        Raises:
            RunError: it ended in another way.
        """
        directory = self._folder / name
        places = [
            "--data",
            self._settings.data,
            "--run-dir",
            str(directory),
            "--save",
            str(_beside(directory, ".safetensors")),
        ]
        device = ["--device", self._settings.device, *(SMALL if self._settings.small else ())]
        return self._start(directory, [script, *places, *device, *words], die)

    def resume(self, run: Run, script: str) -> Run:
        """Let `script` go on with a run that was killed."""
        return self._start(run.directory, [script, "--resume", str(run.directory)], die=False)

    def _start(self, directory: Path, words: Sequence[str], die: bool) -> Run:
        log = _beside(directory, ".log")
        start = time.monotonic()
        process = self._context.Process(target=_work, args=(list(words), log, die))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise RunError(f"{words[0]} did not end within {SECONDS} s")
        if process.exitcode != (-signal.SIGKILL if die else 0):
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RunError(f"{words[0]} ended with exit code {process.exitcode}: {last}")
        seconds = time.monotonic() - start
        return Run(directory, "" if die else _tidy(directory), seconds)

    def at_once(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """Return what `function` returns for each of `items`; an exception stands in place of what it returned."""

        def attempt(item: Any) -> Any:
            try:
                return function(item)
            except Exception as error:  # the other runs go on
                return error

        with ThreadPoolExecutor(1 if self._settings.small else AT_ONCE) as pool:
            return list(pool.map(attempt, items))


def _beside(directory: Path, end: str) -> Path:
    return directory.parent / f"{directory.name}{end}"


def _tidy(directory: Path) -> str:
    """Remove the model and the checkpoints of a run, which are large; return the digest of the model."""
    model = _beside(directory, ".safetensors")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    for path in (model, *directory.glob("checkpoint*.safetensors")):
        path.unlink()
    return digest


def _try(device: str) -> None:
    """Exit with 1 where a process that is forked cannot use `device`."""
    import torch

    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        sys.exit(1)


def _work(words: list[str], log: Path, die: bool) -> None:
    """Become `python words`, with the output in `log`."""
    multiprocessing.set_start_method(None, force=True)  # as in a process of its own
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if die:
        _die_after_the_first_checkpoint()
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def _die_after_the_first_checkpoint() -> None:
    loop: Any = importlib.import_module("lm.training.loop")
    write = loop.write_checkpoint

    def write_and_die(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    loop.write_checkpoint = write_and_die
