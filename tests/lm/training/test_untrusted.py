"""Checkpoints made to do harm, given to --resume."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzz
from hostile import PICKLES
from jobs import mostly_slow
from lm.training.checkpoint import FILE, FORMAT, PREVIOUS
from programs import HALF, SCRIPTS, TINY, Programs
from roundoff.runs.tensor_file import load_tensors, save_tensors
from runs import act_at


@pytest.fixture
def stopped(programs: Programs) -> Programs:
    """With a run in "run" that SIGTERM has stopped, which has a checkpoint and none before it."""
    stop(programs, "main")
    return programs


def stop(programs: Programs, script: str) -> None:
    with act_at(3, lambda: signal.raise_signal(signal.SIGTERM)):
        assert programs.run(script, *TINY, *HALF[script], "--epochs", "1").code == 143
    (programs.folder / "run" / PREVIOUS).unlink(missing_ok=True)


def test_a_command_as_checkpoint(stopped: Programs) -> None:
    """All of them, each alone and with a good one before it."""
    run = stopped.folder / "run"
    good = (run / FILE).read_bytes()
    for name, make in PICKLES.items():
        (run / FILE).write_bytes(make(stopped.folder / "canary"))
        error = stopped.refuse("main", "--resume", "run")
        assert re.search("cannot be used .*(it is a pickle|no safetensors file)", error), name
        assert "cannot be used" in stopped.refuse("probe", "--run", "run")
    (run / PREVIOUS).write_bytes(good)
    done = stopped.run("main", "--resume", "run")
    assert (done.code, done.err) == (0, "")
    assert "going on from the one before it" in done.out
    assert not (stopped.folder / "canary").exists()


def test_a_run_of_an_older_version(stopped: Programs) -> None:
    """Its config.json had no options; its checkpoint is not read, and its records are not cut."""
    run = stopped.folder / "run"
    (run / FILE).rename(run / "checkpoint.pt")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config["options"] | {"environment": config["environment"]}))
    before = (run / "steps.jsonl").read_bytes()
    assert "an older version, or another program, wrote it" in stopped.refuse("main", "--resume", "run")
    assert (run / "steps.jsonl").read_bytes() == before != b""


def test_a_link_to_nothing_as_checkpoint(stopped: Programs) -> None:
    (stopped.folder / "run" / FILE).unlink()
    (stopped.folder / "run" / FILE).symlink_to("nowhere")
    assert "cannot be used" in stopped.refuse("main", "--resume", "run")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in nested dicts and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


TENSORS = [torch.zeros(3), torch.zeros(8, 8), torch.full((8,), torch.nan), torch.zeros(2, dtype=torch.uint8)]
PLAIN = [None, True, -1, 0, 1, 2**62, 1.5, float("nan"), float("inf"), "", "\x1b[2J\n", [], {}, {0: {}}, (0.9, "x")]


@pytest.mark.parametrize("script", mostly_slow(SCRIPTS, "main_fp16_optimizer"))
def test_a_changed_checkpoint_is_gone_on_with_or_refused(programs: Programs, script: str) -> None:
    """Or ends as a run that diverges does."""
    stop(programs, script)
    run, spare = programs.folder / "run", programs.folder / "spare"
    shutil.copytree(run, spare)
    original = load_tensors(run / FILE, FORMAT)
    ends = []

    @fuzz(60)
    @given(st.sampled_from(list(places(original))), st.sampled_from([*PLAIN, *TENSORS]))
    def check(path: tuple[Any, ...], value: Any) -> None:
        shutil.rmtree(run)
        shutil.copytree(spare, run)
        content = deepcopy(original)
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        save_tensors(run / FILE, content, FORMAT)
        done = programs.run(script, "--resume", "run")
        ends.append(done.code)
        assert done.code in (0, 1, 2), path
        assert done.err.count("\n") == (done.code != 0), (path, value)
        assert done.err.strip().isprintable(), (path, value)
        assert len(done.err) < 500

    check()
    assert ends.count(2) > len(ends) / 4


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("precision/optimizer/param_groups/0/lr", "\x1b[2J\n", r"lr is \\x1b\[2J"),
        ("records/steps", "\x1b[2J\n", r"steps is \\x1b\[2J"),
        ("records/steps", 1.5, "not counted in whole numbers"),
        ("random", torch.zeros(3), "random is no list"),
        ("random/0/cpu", torch.zeros(3), "random.cpu is not a"),
    ],
)
def test_what_once_went_through(stopped: Programs, path: str, value: Any, said: str) -> None:
    """Or reached the terminal as it was."""
    file = stopped.folder / "run" / FILE
    content = place = load_tensors(file, FORMAT)
    *way, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in way:
        place = place[key]
    place[last] = value
    save_tensors(file, content, FORMAT)
    error = stopped.refuse("main", "--resume", "run")
    assert re.search(said, error), error
    assert error[:-1].isprintable()


def test_the_folder_is_as_it_was(stopped: Programs) -> None:
    """A refusal leaves all that was there, so that the run can be looked at."""
    path: Path = stopped.folder / "run" / FILE
    path.write_bytes(path.read_bytes()[:-100])
    assert "checkpoint.safetensors cannot be used" in stopped.refuse("main", "--resume", "run")
