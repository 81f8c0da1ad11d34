"""What two runs must have in common to be the same run, and ways to end one early."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

import lm.training.loop
from programs import Done, Programs, read_rows, strict_json

MEASURED = ("tokens_per_second", "peak_memory_bytes")


class KilledError(BaseException):
    """Stands for kill -9: nothing catches it, nothing is tidied up."""


def outcome(folder: Path, run: str = "run", model: str = "model.safetensors") -> dict[str, Any]:
    """All that a run leaves, byte for byte; without times, rates and memory."""
    epochs = [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_rows(folder / run / "epochs.jsonl")
    ]
    result = strict_json((folder / run / "result.json").read_text())
    return {
        "steps": (folder / run / "steps.jsonl").read_bytes(),
        "epochs": json.dumps(epochs),
        "result": {name: value for name, value in result.items() if name not in MEASURED},
        "model": (folder / model).read_bytes(),
    }


def act_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, act: Callable[[], object]) -> None:
    """Let `act` come at the beginning of a call of `Training.name`, or of lm.training.loop's function of that name."""
    owner = lm.training.loop.Training if hasattr(lm.training.loop.Training, name) else lm.training.loop
    original = getattr(owner, name)
    calls = 0

    def acted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, acted)


def kill_at(monkeypatch: pytest.MonkeyPatch, programs: Programs, name: str, call: int, *command: str) -> None:
    """Run `command` and kill it there; see `act_at`."""

    def kill() -> NoReturn:
        raise KilledError

    with monkeypatch.context() as patch:
        act_at(patch, name, call, kill)
        with pytest.raises(KilledError):
            programs.run(*command)


def signal_at(monkeypatch: pytest.MonkeyPatch, number: int, name: str, call: int, times: int = 1) -> None:
    """Let a signal come there, as often as `times` says; see `act_at`."""

    def send() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    act_at(monkeypatch, name, call, send)


def resume(programs: Programs, script: str, *flags: str) -> Done:
    """`python script.py --resume run`, which must succeed."""
    done = programs.run(script, "--resume", "run", *flags)
    assert (done.code, done.err) == (0, ""), done
    return done
