"""Damaged checkpoints, torn records, two runs in one place: the last good state is found, and is gone on from."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disks import MODE, RUN_FILES, START, one_line
from hostile import DAMAGES
from jobs import mostly_slow
from lm.training.checkpoint import DAMAGED, FILE, FORMAT, PREVIOUS
from programs import ROOT, Programs, start
from roundoff.runs.directory import RunDirectory
from roundoff.runs.tensor_file import load_tensors
from runs import KilledError, kill_at, outcome, resume


@pytest.fixture
def killed(tiny: Programs, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]) -> Path:
    """A run that was killed after its second epoch's first checkpoint."""
    kill_at(monkeypatch, tiny, "train_step", 15, *START)
    assert (tiny.folder / "run" / FILE).exists()
    assert (tiny.folder / "run" / PREVIOUS).exists()
    return tiny.folder / "run"


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


LOSSES: dict[str, Callable[[Path], object]] = {
    **{
        name: lambda path, make=damage.make: path.write_bytes(make(path.read_bytes()))
        for name, damage in DAMAGES.items()
    },
    "a model": lambda path: shutil.copy("model.safetensors", path),
    "a directory": directory,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "deleted": Path.unlink,
}
"""Ways to lose a checkpoint."""


@pytest.mark.parametrize("name", mostly_slow(LOSSES, "half", "a bit of a tensor", "a directory", "deleted"))
def test_a_damaged_checkpoint(tiny, killed, expected, name):
    """The one before it is used, and the damaged one is kept."""
    LOSSES[name](killed / FILE)
    out = resume(tiny, MODE[0]).out
    assert out.startswith(f"| run/{FILE} " + ("is missing" if name == "deleted" else "cannot be used ("))
    assert f"; going on from the one before it, {PREVIOUS}\n" in out
    assert "| going on with run at epoch 2, step 10\n" in out
    assert outcome(tiny.folder) == expected
    assert os.path.lexists(killed / DAMAGED) == (name != "deleted")


@pytest.mark.parametrize(
    "left",
    [
        (FILE, PREVIOUS),
        (FILE,),
        (PREVIOUS,),
    ],
)
def test_no_good_checkpoint(tiny, killed, expected, left):
    """The line says what to delete; after that the run starts from its beginning."""
    for name in (FILE, PREVIOUS):
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
            PREVIOUS,
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
        os.truncate(path, load_tensors(killed / FILE, FORMAT)["records"][name] - lost)
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
