"""Run the trainers and generate.py as a user does, but in the test's own process: importing torch takes seconds."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.hooks import RemovableHandle

from lm.launch.entry import run_trainer
from lm.model.language_model import RNNModel
from moments import watch_batches
from roundoff.program import exit_code

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("main", "main_fp16_optimizer", "main_amp")
HALF = {"main": ["--fp16"], "main_fp16_optimizer": ["--fp16", "--dynamic-loss-scale"], "main_amp": ["--fp16"]}
TINY = [
    *("--data", "corpus", "--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "5"),
    *("--epochs", "2", "--run-dir", "run"),
]
"""A model that trains in milliseconds on `write_corpus`: 359 training tokens make 89 rows, so `BATCHES` an epoch."""

MODEL = "model.safetensors"
"""Where a trainer saves its model by default."""

SMALL = TINY[2:10]
"""Its sizes alone."""

PROBE = ["--data", "corpus", "--batches", "4", "--out", "probe"]
"""Flags of probe.py for a probe of them."""

BATCHES = 18
TOKENS = {"train_tokens": 359, "valid_tokens": 108, "test_tokens": 81}
SENTENCES = ("the cat sat on the mat .", "a dog ran after the cat .", "the bird sang all day long in the tree .")


class Done(NamedTuple):
    """What is left of a program that has ended."""

    code: int
    out: str
    err: str


class Run(NamedTuple):
    """A run directory, parsed, and what the trainer printed."""

    config: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]
    out: str


WORDS = ["the", "cat", "<eos>", "sat", "schön", "日本", "on", "mat", ".", "of"]
"""10 words for `make_model`, so that 6 of its 16 scores only pad."""


def make_model(kind: str = "LSTM", tied: bool = False) -> RNNModel:
    """An untrained model that prefers some words to others."""
    torch.manual_seed(0)
    model = RNNModel(kind, 16, 8, 8, 2, 0.2, tied)
    with torch.no_grad():
        model.decoder.weight.mul_(100)
    return model


def write_corpus(folder: Path, train: int = 40, valid: int = 12, test: int = 9) -> Path:
    """A corpus with as many lines in each part."""
    folder.mkdir()
    for name, lines in {"train": train, "valid": valid, "test": test}.items():
        text = "".join(SENTENCES[i % len(SENTENCES)] + "\n" for i in range(lines))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A .jsonl file, row by row; each row ends in a newline."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [strict_json(line) for line in text.splitlines()]


def strict_json(text: str) -> Any:
    """JSON by the standard: Python's own reader also takes NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def read_run(folder: Path, out: str = "") -> Run:
    """The four files of a run directory."""
    return Run(
        strict_json((folder / "config.json").read_text(encoding="utf-8")),
        read_rows(folder / "steps.jsonl"),
        read_rows(folder / "epochs.jsonl"),
        strict_json((folder / "result.json").read_text(encoding="utf-8")),
        out,
    )


class Programs:
    """Runs programs in the empty folder `folder`, which is the working directory and holds the folder "corpus"."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.chdir(folder)
        self.hooks: list[RemovableHandle] = []
        write_corpus(folder / "corpus")

    def run(self, script: str, *flags: str) -> Done:
        """`python script.py flags`, ended in any way."""
        self._monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        self._capsys.readouterr()
        try:
            module = importlib.import_module(script)
            if script in SCRIPTS:
                code = run_trainer(module.main, module.__file__, module.__doc__)
            else:
                code = exit_code(module.main)
        except SystemExit as stop:
            code = stop.code
        return Done(code, *self._capsys.readouterr())

    def train(self, script: str, *flags: str, name: str = "run") -> Run:
        """A tiny run into `name` that succeeds."""
        done = self.run(script, *TINY, "--run-dir", name, *flags)
        assert (done.code, done.err) == (0, "")
        return read_run(self.folder / name, done.out)

    def files(self) -> dict[str, bytes | None]:
        """Everything in the folder, hidden files too; None for a folder."""
        return {
            str(path.relative_to(self.folder)): None if path.is_dir() else path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_dir() or path.is_file()
        }

    def refuse(self, script: str, *flags: str) -> str:
        """Run a mistake, which must leave nothing behind; return the one line that it gets."""
        before = self.files()
        done = self.run(script, *flags)
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(r"error: \S[^\n]+\n", done.err), done.err
        assert len(done.err) < 500
        assert "Traceback" not in done.err
        assert self.files() == before
        return done.err

    def before_training(self, act: Callable[[RNNModel], object]) -> None:
        """Let `act` have the model of every run from now on, before its first training batch."""
        met: list[RNNModel] = []

        def seen(model: RNNModel) -> None:
            if not any(model is each for each in met):
                met.append(model)
                act(model)

        self.hooks += watch_batches(lambda _: None, seen)

    def spoil_gradients(self, steps: set[int], parameter: str, value: float = torch.inf) -> list[RNNModel]:
        """Put `value` into one element of this parameter's gradient at these steps; return where the model will be."""
        models: list[RNNModel] = []
        count = 0

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            nonlocal count
            count += 1
            if count not in steps:
                return None
            gradient = gradient.clone()
            gradient.view(-1)[-1] = value
            return gradient

        def register(model: RNNModel) -> None:
            models.append(model)
            dict(model.named_parameters())[parameter].register_hook(spoil)

        self.before_training(register)
        return models


def start(folder: Path, script: str, *flags: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python script.py flags` as a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    return subprocess.Popen(command, cwd=folder, env=environment, **options)
