"""The one harness for faults: what disturbs a run, what it must leave behind, and when two runs are the same run."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

import jobs
from lm.model.model_file import load_model
from lm.training.checkpoint import FILE, PREVIOUS, read_checkpoint
from moments import watch_batches
from programs import MODEL, TINY, Done, Programs, read_rows, strict_json, write_corpus
from ranks import Ended, Ranks

MEASURED = ("tokens_per_second", "peak_memory_bytes")
RUN_FILES = ("config.json", "steps.jsonl", "epochs.jsonl", "result.json", FILE)
BATCHES = 9
"""An epoch of a `Faulty` run has as many; the run has 3 epochs, and checkpoints after `SAVES`."""
SAVES = (4, 8, 9, 12, 16, 18, 20, 24, 27)
FLAGS = [
    *(*TINY, "--epochs", "3", "--lr", "30", "--dropout", "0.3", "--log-interval", "5"),
    *("--checkpoint-interval", "4"),
]


def outcome(folder: Path, run: str = "run", model: str = MODEL) -> dict[str, Any]:
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
        "model": (folder / model).read_bytes() if (folder / model).exists() else None,
    }


def read_one(path: Path) -> dict[str, Any]:
    """The content of this very checkpoint, which must be whole; nothing beside it is looked at, or changed."""
    alone = path.with_name("alone")
    alone.mkdir()
    shutil.copy(path, alone / FILE)
    content = read_checkpoint(alone)
    assert content is not None
    shutil.rmtree(alone)
    return content


def state_bits(path: Path) -> str:
    """All that a checkpoint holds but times: weights, masters, optimizer, hidden state, generators, position."""
    content = read_one(path)
    position = {name: value for name, value in content["position"].items() if not name.endswith("seconds")}
    parts = ("model", "precision", "hidden", "random", "best_weights")
    return repr(plain({name: content[name] for name in parts} | {"position": position}))


def plain(value: Any) -> Any:
    """`value` with the bytes of each tensor in its place, to be compared wherever it is."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), jobs.bits([value])[0]
    if isinstance(value, dict):
        return sorted((str(key), plain(part)) for key, part in value.items())
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def one_line(ended: Ended | Done, code: int, *parts: str) -> None:
    """It ended with this code and one line of error, which has all `parts`."""
    err = ended.err if isinstance(ended.err, str) else "".join(ended.err)
    assert code in (ended.codes if isinstance(ended, Ended) else [ended.code]), ended
    assert re.fullmatch(r"error: \S[^\n]+\n", err), err
    assert len(err) < 500
    for part in parts:
        assert part in err


def check_whole(folder: Path, killed: bool = False) -> None:
    """What is there can be read, and nothing is there that does not belong; a kill may leave the file it wrote."""
    run = folder / "run"
    for path in run.glob("checkpoint*"):
        read_one(path)
    if (folder / MODEL).exists():
        model, _ = load_model(folder / MODEL)
        assert all(weight.isfinite().all() for weight in model.parameters())
    for path in run.glob("*.json"):
        strict_json(path.read_text())
    leftovers = Counter(re.sub(r"\.\w+\.tmp$", "", path.name) for path in folder.rglob(".*.tmp"))
    assert set(leftovers.values()) <= ({1} if killed else set()), leftovers
    assert {path.name for path in run.glob("[!.]*")} <= {*RUN_FILES, PREVIOUS}


class Command(NamedTuple):
    """A run to disturb: in how many processes, by which script, with which flags besides `FLAGS`."""

    processes: int
    script: str
    flags: tuple[str, ...]


class Expected(NamedTuple):
    """What the run leaves that nobody disturbs."""

    code: int
    outcome: dict[str, Any]
    state: str
    moments: list[str]


class Faulty:
    """Runs a command in the folder `folder`, disturbs it, resumes it, and compares it with the undisturbed run.

    `known` keeps what undisturbed runs left, for all tests of a session.
    """

    def __init__(self, ranks: Ranks, known: dict[Command, Expected]) -> None:
        self.ranks, self.known = ranks, known
        self.folder = ranks.folder
        self.run_dir = self.folder / "run"
        shutil.rmtree(self.folder / "corpus", ignore_errors=True)
        write_corpus(self.folder / "corpus", train=20)

    def undisturbed(self, command: Command) -> Expected:
        """What `command` leaves when nothing happens; the folder is as it was."""
        if command not in self.known:
            ended = self.start(command, note={"name": "moments"})
            assert self.run_dir.exists(), ended
            noted = self.folder / "moments"
            state = state_bits(self.run_dir / FILE)
            self.known[command] = Expected(max(ended.codes), outcome(self.folder), state, noted.read_text().split("\n"))
            noted.unlink()
            self.clear()
        return self.known[command]

    def clear(self) -> None:
        """Remove the results."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        (self.folder / MODEL).unlink(missing_ok=True)

    def start(self, command: Command, **fault: Any) -> Ended:
        """The run from its beginning."""
        return self.ranks.run(command.processes, command.script, *FLAGS, *command.flags, **fault)

    def resume(self, command: Command, *flags: str, **fault: Any) -> Ended:
        """Go on, which must be from the last checkpoint that is there."""
        newest = self.run_dir / FILE
        step = read_one(newest)["records"]["steps"] + 1 if newest.exists() else 1
        ended = self.ranks.run(command.processes, command.script, "--resume", "run", *flags, **fault)
        line = ended.out[0].partition("\n")[0]
        if line or 0 in ended.codes:
            ended_before = r"\| nothing to do: the run in run has come to the end that --epochs \d sets; .*"
            assert re.fullmatch(rf"\| going on with run at epoch \d, step {step}|{ended_before}", line), (step, ended)
        return ended

    def check(self, command: Command, *flags: str) -> None:
        """Resume the run, or start it where there is none yet; it must become the undisturbed one."""
        started = (self.run_dir / "config.json").exists()
        ended = self.resume(command, *flags) if started else self.start(command)
        expected = self.known[command]
        assert (max(ended.codes), ended.out[1:]) == (expected.code, [""] * (command.processes - 1)), ended
        assert ("".join(ended.err) == "") == (expected.code == 0), ended
        check_whole(self.folder)
        left = outcome(self.folder)
        for name, value in expected.outcome.items():
            assert left[name] == value, name
        assert state_bits(self.run_dir / FILE) == expected.state


class KilledError(BaseException):
    """Stands for kill -9 within the test's process: no program catches it."""


@contextmanager
def act_at(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Let `act` come before the `step`-th training batch of this process."""
    left = step

    def come(moment: str) -> None:
        nonlocal left
        left -= moment == "train_step"
        if moment == "train_step" and left == 0:
            act()

    hooks = watch_batches(come)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kill_at(programs: Programs, step: int, *command: str) -> None:
    """Run `command` in this process, and kill it before its `step`-th training batch."""

    def kill() -> NoReturn:
        raise KilledError

    with act_at(step, kill), pytest.raises(KilledError):
        programs.run(*command)


def resume(programs: Programs, script: str, *flags: str) -> Done:
    """`python script.py --resume run` in this process, which must succeed."""
    done = programs.run(script, "--resume", "run", *flags)
    assert (done.code, done.err) == (0, ""), done
    return done
