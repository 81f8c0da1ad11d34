"""One writer at a time: locks of directories, and files beside others that a killed writer has left."""

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from programs import read_run
from roundoff.errors import UsageError
from roundoff.runs import files, reading
from roundoff.runs.directory import RunDirectory
from roundoff.runs.files import lock, remove_leftovers, sync_directory, unlock, write_atomically


def no_locks(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_directory_has_one_holder(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    (tmp_path / "other").mkdir()
    unlock(lock(tmp_path / "other"))
    unlock(held)
    unlock(lock(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]  # a lock leaves nothing behind


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_directory_in_use_is_refused_until_it_is_closed(tmp_path, resume):
    path = tmp_path / "run"
    first = RunDirectory(path, mode="fp32")
    before = read_all(path)
    where = "resume=True, path=" if resume else "path="
    with pytest.raises(UsageError) as refused:
        RunDirectory(path, mode="amp", resume=resume)
    assert str(refused.value) == (
        f"{where}{path} is in use by another run; wait for its end, or give another directory"
    )
    assert read_all(path) == before
    first.close()
    RunDirectory(path, resume=True).close()


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_where_the_file_system_knows_no_locks_all_works_unguarded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "lock_descriptor", no_locks)
    assert lock(tmp_path) is None
    (tmp_path / ".file.abc.tmp").touch()
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    assert read_all(tmp_path) == {"file": b"content", ".file.abc.tmp": b""}  # whose it is cannot be known
    with RunDirectory(tmp_path / "run", mode="fp32") as run:
        run.step(1.0)


@pytest.mark.parametrize("name", [None, "file"])
def test_what_a_killed_writer_has_left_is_removed(tmp_path, name):
    """A living writer's file stays, and so does everything else; names are no patterns."""
    kept = {"file", "other", ".hidden", ".file.tmp.txt", "file.tmp", ".[f]ile"}
    for path in kept:
        (tmp_path / path).touch()
    for path in (".file.abc.tmp", ".other.abc.tmp"):
        (tmp_path / path).touch()
    left = {".other.abc.tmp"} if name else set()

    def write(file: Any) -> None:
        (tmp_path / ".file.def.tmp").touch()
        remove_leftovers(tmp_path, name)
        (living,) = {path.name for path in tmp_path.iterdir()} - kept - left
        assert (tmp_path / living).samefile(file.name if isinstance(file.name, str) else f"/dev/fd/{file.fileno()}")
        file.write(b"content")

    write_atomically(tmp_path / "file", write)
    assert {path.name for path in tmp_path.iterdir()} == kept | left
    assert (tmp_path / "file").read_bytes() == b"content"


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"
    write_atomically(
        path, lambda outer: (write_atomically(path, lambda inner: inner.write(b"inner")), outer.write(b"outer"))
    )
    assert read_all(tmp_path) == {"file": b"outer"}


def test_a_run_that_goes_on_removes_what_it_left(tmp_path):
    RunDirectory(tmp_path / "run", mode="fp32").close()
    for name in ("config.json", "result.json", "checkpoint.safetensors", "notes"):
        (tmp_path / "run" / f".{name}.x1.tmp").touch()
    RunDirectory(tmp_path / "run", resume=True).close()
    assert set(read_all(tmp_path / "run")) == {"config.json", "steps.jsonl", "epochs.jsonl", ".notes.x1.tmp"}


def test_a_system_without_directories_that_open(tmp_path, monkeypatch):
    """As Windows: a lock is a file then, which readers pass over, and leftovers go."""
    open_ = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if os.path.isdir(path):  # noqa: PTH112 - a path of any type
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_(path, *rest)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", refuse)
    sync_directory(tmp_path)
    with RunDirectory(tmp_path / "run", mode="fp32") as run:
        run.step(1.0)
        (tmp_path / "run" / ".result.json.abc.tmp").touch()
        with pytest.raises(UsageError, match="in use"):
            RunDirectory(tmp_path / "run", resume=True)
        run.finish()
    assert set(read_all(tmp_path / "run")) == {".lock", "config.json", "steps.jsonl", "epochs.jsonl", "result.json"}
    assert reading.read_run(tmp_path / "run").problems == []
    assert read_run(tmp_path / "run").result["status"] == "finished"
    monkeypatch.setattr(Path, "touch", no_locks)
    with pytest.raises(UsageError, match="cannot write there"):
        RunDirectory(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    RunDirectory(tmp_path / "run", resume=True).close()
