"""The checkpoint of a run: all that lets it go on to the bit, and the reading of it, which trusts nothing."""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lm.options.options import Options
from roundoff.errors import BadFileError, UsageError, printable
from roundoff.runs.directory import FILES
from roundoff.runs.jsonfile import as_read_back, read_object
from roundoff.runs.reading import machine
from roundoff.runs.tensor_file import load_tensors, save_tensors
from roundoff.terminal import say

FORMAT = "roundoff checkpoint 2"
FILE = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
DAMAGED = "checkpoint.damaged.safetensors"


@dataclass
class Position:
    """The progress of a run.

    Attributes:
        lr: from which the schedule takes that of a step: --lr, divided so far by annealing.
        epoch: of the next step, from 1.
        batch: how many batches of that epoch lie behind; all of them where only the validation is left.
        best: lowest validation loss so far.
        skipped_in_a_row: steps up to now without effect.
        words: trained on, in all.
        training_seconds: spent on them.
        epoch_seconds: spent on this epoch.
    """

    lr: float
    epoch: int = 1
    batch: int = 0
    best: float | None = None
    skipped_in_a_row: int = 0
    words: int = 0
    training_seconds: float = 0.0
    epoch_seconds: float = 0.0

    def end(self, args: Options, steps: int) -> str | None:
        """Return the option by which a run has come to its end here, after `steps`; None where it goes on."""
        if self.epoch > args.epochs:
            return f"--epochs {args.epochs}"
        if self.batch > 0:  # the validation is left
            return None
        if args.dry_run and steps >= 1:
            return "--dry-run"
        return f"--max-steps {args.max_steps}" if steps >= (args.max_steps or math.inf) else None

    @classmethod
    def restore(cls, state: Any) -> Self:
        """Return the position that a checkpoint holds.

        Raises:
            ValueError: `state` is no position.
        """
        types: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        if not isinstance(state, dict) or state.keys() != types.keys():
            raise ValueError("its position has other fields")
        for name, value in state.items():
            allowed = (float, type(None)) if name == "best" else (types[name],)
            negative = isinstance(value, int | float) and not value >= 0 and name != "best"
            if type(value) not in allowed or negative:
                raise ValueError(f"{name} is {str(value)[:20]}")
        position = cls(**state)
        if position.epoch < 1 or not 0 < position.lr < math.inf:
            raise ValueError(f"epoch is {position.epoch}, lr is {position.lr}")
        if position.best is not None and not math.isfinite(position.best):
            raise ValueError(f"the best validation loss is {position.best}")
        return position


def check_not_of_the_run(flag: str, path: Path, run_dir: Path | None) -> None:
    """Raise UsageError, naming `flag`, where `path` is one of the run's own files, or holds its directory.

    `run_dir` is None for a new directory below runs/.
    """
    run = Path(os.path.realpath("runs" if run_dir is None else run_dir))
    files = () if run_dir is None else (os.path.realpath(run / name) for name in (*FILES, FILE, PREVIOUS, DAMAGED))
    if os.path.realpath(path) in {str(run), *map(str, run.parents), *files}:
        raise UsageError(f"{flag} {path} is the run's own, or a folder of it; give another name")


def write_checkpoint(directory: Path, content: dict[str, Any]) -> None:
    """Make `content` the run's checkpoint, and keep the one before it."""
    save_tensors(directory / FILE, content, FORMAT, keep=directory / PREVIOUS)


def read_checkpoint(directory: Path) -> dict[str, Any] | None:
    """Return the run's last checkpoint, or the one before it where that is damaged; None before the first one.

    Raises:
        UsageError: those that are there cannot be used.
    """
    newest = directory / FILE
    problem = f"{newest} is missing"
    damaged: list[str] = []
    for path in (newest, directory / PREVIOUS):
        if not os.path.lexists(path):
            continue
        try:
            content: dict[str, Any] = load_tensors(path, FORMAT)
            if not isinstance(content, dict):
                raise BadFileError("it holds no state of a run")
        except (BadFileError, FileNotFoundError) as error:  # no such file: a link to one that is gone
            damaged.append(str(path))
            problem = f"{path} cannot be used ({error})" if len(damaged) == 1 else problem
            continue
        if path != newest:
            say(f"| {problem}; going on from the one before it, {path.name}")
            if damaged:  # out of the way, but not lost
                newest.replace(directory / DAMAGED)
            path.replace(newest)
        return content
    if damaged:
        raise UsageError(f"--resume: {problem}; delete {' and '.join(damaged)} to start the run from its beginning")
    return None


def check_like(value: Any, template: Any, where: str) -> None:
    """Raise ValueError unless `value` is built as `template` is: same keys, same types, same shapes and dtypes."""
    if isinstance(template, Tensor):
        fits = isinstance(value, Tensor) and value.shape == template.shape and value.dtype == template.dtype
        if not fits:
            raise ValueError(f"{where} is not a {tuple(template.shape)} tensor of {template.dtype}")
    elif isinstance(template, dict):
        if not isinstance(value, dict) or not value.keys() >= template.keys():
            raise ValueError(f"{where} has other entries")
        for key, part in template.items():
            check_like(value[key], part, f"{where}.{key}")
    elif isinstance(template, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(template):
            raise ValueError(f"{where} has not {len(template)} elements")
        for i, part in enumerate(template):
            check_like(value[i], part, f"{where}.{i}")
    elif not (isinstance(value, type(template)) or {type(value), type(template)} <= {int, float}):
        raise ValueError(f"{where} is {str(value)[:20]}")


def status_of(directory: Path) -> str | None:
    """Return how the run ended: "finished", "interrupted" or "diverged"; None if it has not, or nothing says so."""
    status = _entry(directory / "result.json", "status")
    return status if isinstance(status, str) else None


def processes_of(directory: Path) -> Any:
    """Return how many processes the run had when its config.json was written."""
    environment = _entry(directory / "config.json", "environment")
    return environment.get("processes") if isinstance(environment, dict) else None


def has_options(directory: Path, options: Any) -> bool:
    """Return whether the run's config.json holds these options, wherever its directory is now."""
    recorded = _entry(directory / "config.json", "options")
    now = as_read_back(options)
    return isinstance(recorded, dict) and recorded | {"run_dir": None} == now | {"run_dir": None}


def moved(directory: Path, config: dict[str, Any]) -> str:
    """Return the facts of the machine that `config` and the run's config.json do not share; "" if there are none.

    A fact that only one of the two names is not compared: an older config.json names no cuDNN.
    """
    try:
        before = machine(read_object(directory / "config.json"))
    except (OSError, UsageError, LookupError, AttributeError, RecursionError):
        return ""
    now = machine(config)
    other = [name for name in now if name in before and now[name] != before[name]]
    return ", ".join(f"{name} {now[name]}, not {printable(before[name])}" for name in other)


def _entry(path: Path, name: str) -> Any:
    try:
        return read_object(path).get(name)
    except (OSError, UsageError):
        return None
