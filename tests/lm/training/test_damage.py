"""Damaged checkpoints, torn records, two runs in one place: the last good state is found, and is gone on from."""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roundoff.runs.tensorfile import load_tensors

from disks import MODE, RUN_FILES, START, one_line
from lm.training.checkpoint import read_checkpoint
from programs import ROOT, Programs, start
from roundoff.runs.directory import RunDirectory
from runs import KilledError, kill_at, outcome, resume


@pytest.fixture
def killed(tiny: Programs, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]) -> Path:
    """A run that was killed after its second epoch's first checkpoint; a copy, to begin with again."""
    kill_at(monkeypatch, tiny, "train_step", 15, *START)
    shutil.copytree(tiny.folder / "run", tiny.folder / "copy")
    assert {"checkpoint.safetensors", "checkpoint.previous.safetensors"} <= {
        path.name for path in (tiny.folder / "copy").iterdir()
    }
    return tiny.folder / "run"


def again(run: Path) -> Path:
    """Put the killed run back as it was; return its checkpoint."""
    shutil.rmtree(run)
    shutil.copytree(run.with_name("copy"), run)
    return run / "checkpoint.safetensors"


def damages() -> dict[str, Callable[[Path], object]]:
    """Ways to lose a checkpoint."""
    flips = {f"bit flipped at {place / 40:.0%}": place / 40 for place in range(40)}
    cuts = {f"cut at {place / 10:.0%}": place / 10 for place in range(10)}

    def flip(path: Path, where: float) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= 16
        path.write_bytes(data)

    def directory(path: Path) -> None:
        path.unlink()
        path.mkdir()
        (path / "file").touch()

    return (
        {name: lambda path, where=where: flip(path, where) for name, where in flips.items()}
        | {
            name: lambda path, where=where: os.truncate(path, int(where * path.stat().st_size))
            for name, where in cuts.items()
        }
        | {
            "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
            "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
            "a directory": directory,
            "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
            "a text": lambda path: path.write_text("no checkpoint"),
            "a model": lambda path: shutil.copy("model.safetensors", path),
            "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
            "deleted": Path.unlink,
        }
    )


@pytest.mark.slow
def test_a_damaged_checkpoint(tiny, killed, expected, record_testsuite_property):
    """The one before it is used. A flip in what nobody reads, such as padding, is none."""
    fell_back = 0
    for name, damage in damages().items():
        damage(again(killed))
        out = resume(tiny, MODE[0]).out
        if "| going on with run at epoch 2, step 10\n" in out:
            fell_back += 1
            assert "; going on from the one before it, checkpoint.previous.safetensors\n" in out
            assert out.startswith(
                "| run/checkpoint.safetensors " + ("is missing" if name == "deleted" else "cannot be used (")
            )
        else:
            assert name.startswith("bit"), name
            assert out.startswith("| going on with run at epoch 2, step 13\n"), out
        assert outcome(tiny.folder) == expected, name
        assert os.path.lexists(killed / "checkpoint.damaged.safetensors") == ("cannot be used (" in out)
    assert fell_back > 45
    record_testsuite_property("damaged checkpoints survived", fell_back)


@pytest.mark.slow
def test_every_damage_is_found_or_none(killed, capsys):
    """200 flipped bits and 50 lengths: what is read is one of the two checkpoints, to the bit."""
    path = again(killed)
    newest, previous = (
        saved(load_tensors(killed / name)) for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors")
    )
    good = path.read_bytes()
    chance = random.Random(0)
    found = 0
    for case in range(250):
        data = bytearray(good)
        if case < 200:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        shutil.copy(killed.with_name("copy") / "checkpoint.previous.safetensors", killed)
        content = saved(read_checkpoint(killed))
        if "cannot be used" in capsys.readouterr().out:
            found += 1
            assert content == previous
        else:
            assert case < 200
            assert content == newest
    assert found > 200


def saved(content: Any) -> bytes:
    """As bytes, to compare."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "left",
    [
        ("checkpoint.safetensors", "checkpoint.previous.safetensors"),
        ("checkpoint.safetensors",),
        ("checkpoint.previous.safetensors",),
    ],
)
def test_no_good_checkpoint(tiny, killed, expected, left):
    """The line says what to delete; after that the run starts from its beginning."""
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        if name in left:
            os.truncate(killed / name, 1000)
        else:
            (killed / name).unlink()
    error = tiny.refuse(MODE[0], "--resume", "run")
    assert f"delete {' and '.join(f'run/{name}' for name in left)} to start" in error
    for name in left:
        (killed / name).unlink()
    assert "| going on with run at epoch 1, step 1\n" in resume(tiny, MODE[0]).out
    assert outcome(tiny.folder) == expected


@pytest.mark.slow
def test_two_runs_in_one_directory(tiny):
    """A second one is refused, a resume too, until the first is dead."""
    process = start(tiny.folder, *START, "--epochs", "1000000", stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for flags in (START, [MODE[0], "--resume", "run"]):
            done = tiny.run(*flags, "--save", "other.pt")
            assert done.out == ""
            one_line(done, 2, "run is in use by another run")
            assert not (tiny.folder / "other.pt").exists()
        assert process.poll() is None
        assert {path.name for path in (tiny.folder / "run").glob("[!.]*")} <= {
            *RUN_FILES,
            "checkpoint.previous.safetensors",
        }
    finally:
        process.kill()
        process.communicate()
    RunDirectory.reopen(tiny.folder / "run").close()


HOLDER = """
import subprocess, sys, time
from pathlib import Path
from roundoff.runs.files import lock
held = lock(Path("run"))
child = subprocess.Popen(["sleep", "60"], close_fds=False)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_lock_without_a_record_and_the_lock_of_a_dead_process(tiny, expected):
    """The holder has written nothing yet; then it is killed, and leaves a child behind that holds nothing."""
    (tiny.folder / "run").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert "--run-dir run is in use by another run" in tiny.refuse(*START)
        process.kill()
        process.wait()
        os.kill(child, 0)  # still there
        assert tiny.run(*START).code == 0
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.communicate()
    assert outcome(tiny.folder) == expected


def test_a_torn_line_is_cut(tiny, killed, expected):
    for name, rest in {"steps.jsonl": b'{"step": 16, "lo', "epochs.jsonl": b"{"}.items():
        with (killed / name).open("ab") as file:
            file.write(rest)
    resume(tiny, MODE[0])
    assert outcome(tiny.folder) == expected


@pytest.mark.parametrize("name", ["steps.jsonl", "epochs.jsonl"])
@pytest.mark.parametrize("lost", [1, None], ids=["a byte", "all"])
def test_records_shorter_than_the_checkpoint_says(tiny, killed, name, lost):
    path = killed / name
    other = killed / ("epochs.jsonl" if name == "steps.jsonl" else "steps.jsonl")
    other.write_bytes(other.read_bytes() + b"{")  # which must not be cut first
    if lost:
        os.truncate(path, load_tensors(killed / "checkpoint.safetensors")["records"][name] - lost)
    else:
        path.unlink()
    error = tiny.refuse(MODE[0], "--resume", "run")
    assert f"{name} has " in error
    assert "start a new run" in error


@pytest.mark.parametrize("place", ["config.json", "steps.jsonl"])
def test_a_kill_while_the_directory_is_made(tiny, monkeypatch, expected, place):
    """Before config.json there is no run yet, and after it one to resume."""
    with monkeypatch.context() as patch:
        if place == "config.json":
            patch.setattr(os, "fsync", killing)
        else:
            patch.setattr(Path, "touch", killing)
        with pytest.raises(KilledError):
            tiny.run(*START)
    done = tiny.run(*START) if place == "config.json" else tiny.run(MODE[0], "--resume", "run")
    assert (done.code, done.err) == (0, "")
    assert outcome(tiny.folder) == expected


def killing(*_: object) -> None:
    raise KilledError
