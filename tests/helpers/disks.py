"""Disks that fail in a chosen moment, a short run to try them with, and what must hold after it."""

import errno
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.model.model_file import load_model
from lm.training.checkpoint import FORMAT
from programs import TINY, Done, strict_json
from roundoff.runs.tensor_file import load_tensors

MODE = ["main_fp16_optimizer", "--fp16", "--dynamic-loss-scale"]
FLAGS = [*TINY, "--lr", "30", "--log-interval", "3", "--dropout", "0.3", "--checkpoint-interval", "4"]
START = [*MODE, *FLAGS]
RUN_FILES = ("config.json", "steps.jsonl", "epochs.jsonl", "result.json", "checkpoint.safetensors")


def clear(folder: Path) -> None:
    """Remove the results."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "model.safetensors").unlink(missing_ok=True)


def check_whole(folder: Path) -> None:
    """What is there can be read, and nothing is there that does not belong."""
    run = folder / "run"
    for path in run.glob("checkpoint*.safetensors"):
        load_tensors(path, FORMAT)
    if (folder / "model.safetensors").exists():
        load_model(folder / "model.safetensors")
    for path in run.glob("*.json"):
        strict_json(path.read_text())
    assert not list(folder.rglob(".*")), "left behind"
    allowed = {*RUN_FILES, "checkpoint.previous.safetensors"}
    assert {path.name for path in run.glob("*")} <= allowed


def one_line(done: Done, code: int, *parts: str) -> None:
    """It ended with this code and one line of error, which has all `parts`."""
    assert done.code == code, done
    assert re.fullmatch(r"error: \S[^\n]+\n", done.err), done.err
    assert len(done.err) < 500
    for part in parts:
        assert part in done.err


class FullDisk:
    """Lets every write from the n-th on fail, as open() sees it; an odd n-th, after its first half.

    Attributes:
        hit: the name of the file that the first failure met; None before it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, number: int = errno.ENOSPC) -> None:
        self.left = n
        self.hit: str | None = None
        disk, original = self, io.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.left -= 1
                if disk.left > 0:
                    return super().write(data)
                name = disk.hit
                if name is None:
                    target = Path(f"/proc/self/fd/{self.fileno()}").readlink()
                    disk.hit = re.sub(r"^\.(.+)\.\w+\.tmp$", r"\1", target.name)
                    if len(data) > 1 and n % 2:
                        return super().write(memoryview(data)[: len(data) // 2])
                raise OSError(number, os.strerror(number))

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wa") or "opener" in options:
                return original(file, mode, *rest, **options)
            binary = io.BufferedWriter(Raw(file, mode.replace("b", "")))
            return binary if "b" in mode else io.TextIOWrapper(binary, "utf-8")

        monkeypatch.setattr(io, "open", opened)


class FailingCall:
    """Lets the n-th call of one of `names` in os fail, once. `hit` says which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, *names: str) -> None:
        self.left = n
        self.hit: str | None = None
        for name in names:
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))

    def _failing(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.hit = name
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **options)

        return call


class ReadOnly:
    """From the n-th change to a directory or file on, all fail with `number`. `hit` says which was the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, number: int) -> None:
        self.left, self.number = n, number
        self.hit: str | None = None
        for name in ("mkdir", "replace", "link", "unlink", "chmod"):
            monkeypatch.setattr(os, name, self._guard(getattr(os, name), lambda *_: True))
        monkeypatch.setattr(os, "open", self._guard(os.open, lambda flags, *_: flags & (os.O_WRONLY | os.O_RDWR)))
        monkeypatch.setattr(io, "open", self._guard(io.open, lambda mode="r", *_: set(mode) & set("wa")))

    def _guard(self, original: Callable[..., Any], changes: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if not isinstance(path, int) and changes(*args):
                self.left -= 1
                if self.left <= 0:
                    self.hit = self.hit or str(path)
                    raise OSError(self.number, os.strerror(self.number), str(path))
            return original(path, *args, **options)

        return call
