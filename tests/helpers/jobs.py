"""The training job at a size that tests can afford, run through the real scripts."""

import gc
import importlib
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.launch.entry import run_trainer
from lm.options import modes
from lm.options.config import parse_args
from lm.options.options import words
from lm.training.loop import Training

SIZE = ["--emsize", "16", "--nhid", "16", "--batch_size", "4", "--bptt", "5", "--log-interval", "20", "--lr", "2"]

MODES = {name: [mode.script, *words(mode.options)] for name, mode in modes.MODES.items()} | {
    "amp-fp16-static": ["main_amp", "--static-loss-scale", "128"]
}
"""Every kind of precision management, as the command line that asks for it."""


DYNAMIC = ("fp16-optimizer-dynamic", "amp-fp16", "apex-o1", "apex-o2")
"""Those of them whose loss scale is dynamic."""


def if_dynamic(mode: str, *flags: str) -> list[str]:
    """`flags` of a dynamic loss scale, for a mode that has one; others refuse them."""
    return [*flags] if mode in DYNAMIC else []


def mostly_slow(values: Iterable[Any], *kept: Any) -> list[Any]:
    """`values` for pytest.mark.parametrize; all but `kept` are slow, that is for `make test-all`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def on(device: str) -> list[str]:
    """The flags for a device, on which runs must repeat themselves."""
    return ["--device", device, *(["--deterministic"] if device == "cuda" else [])]


def live_tensors() -> list[torch.Tensor]:
    """Every tensor of this process, parameters aside."""
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]  # isinstance asks lazy modules, too


def count_tensors() -> int:
    """How many there are, without what earlier tests left behind."""
    gc.collect()
    return len(live_tensors())


def write_corpus(folder: Path, words: int = 61, lines: int = 300, seed: int = 0) -> Path:
    """A corpus in which few words are frequent, which is soon learnt; a tenth of the lines for valid and test."""
    choice = random.Random(seed)
    folder.mkdir(parents=True)
    for name, count in (("train", lines), ("valid", lines // 10), ("test", lines // 10)):
        text = [" ".join(f"w{int(words * choice.random() ** 3)}" for _ in range(10)) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n")
    return folder


class CapturedError(Exception):
    """Carries what a script built out of its main(), in place of training."""


def build(monkeypatch: pytest.MonkeyPatch, corpus: Path, script: str, *flags: str) -> Training:
    """What `script` builds for `flags`, ready to train: real arguments, corpus, model and precision."""
    module = importlib.import_module(script)

    def capture(*built: Any) -> int:
        raise CapturedError(*built)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", capture)
        args = parse_args(script, None, ["--data", str(corpus), *SIZE, *flags])
        with pytest.raises(CapturedError) as captured:
            module.main(args)
    return Training(*captured.value.args)


def run(monkeypatch: pytest.MonkeyPatch, corpus: Path | str, run_dir: Path, script: str, *flags: str) -> int:
    """Run `script` from its first line to its exit code, recording into `run_dir`."""
    module = importlib.import_module(script)
    flags = ("--data", str(corpus), *SIZE, "--run-dir", str(run_dir), "--save", f"{run_dir}.pt", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *flags])
        return run_trainer(module.main, module.__file__, module.__doc__)


def rows(run_dir: Path, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of a run."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    """The exact bytes of `tensors`, in which nan equals itself and 0.0 differs from -0.0."""
    return [t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
