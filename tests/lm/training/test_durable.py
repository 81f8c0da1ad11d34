"""Full disks and read-only disks: the last good state stays, and is gone on from when there is room again."""

import errno
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lm.training.loop
from disks import MODE, RUN_FILES, START, FailingCall, FullDisk, ReadOnly, check_whole, clear, one_line
from forks import Forks
from jobs import mostly_slow
from programs import Done, Programs, start, write_corpus
from roundoff.runs.directory import RunDirectory
from runs import KilledError, outcome, resume


def fail_every(
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, Any],
    inject: Callable[[pytest.MonkeyPatch, int], Any],
) -> Counter[str]:
    """Run with `inject`(..., n) for n = 1, 2, ... until nothing fails any more; return which files were hit."""
    hits: Counter[str] = Counter()
    n = 0
    while True:
        n += 1
        with monkeypatch.context() as patch:
            fault = inject(patch, n)
            done = programs.run(*START)
        if fault.hit is None:
            assert (done.code, done.err) == (0, "")
            return hits
        hits[fault.hit] += 1
        check_whole(programs.folder)
        if not (programs.folder / "run").exists():
            one_line(done, 2, "--run-dir run", "give another directory")
            assert programs.run(*START).code == 0
        else:
            one_line(done, 1, fault.hit, "No space left", "--resume run")
            resume(programs, MODE[0])
        assert outcome(programs.folder) == expected, (n, fault.hit)
        check_whole(programs.folder)
        clear(programs.folder)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(tiny, monkeypatch, expected, record_testsuite_property):
    hits = fail_every(tiny, monkeypatch, expected, FullDisk)
    assert hits.keys() == {*RUN_FILES, "model.safetensors"}
    assert min(hits.values()) >= 1
    assert hits["checkpoint.safetensors"] >= 6
    record_testsuite_property("failed writes survived", hits.total())


@pytest.mark.parametrize("name", mostly_slow(["fsync", "replace", "link"], "replace"))
def test_a_disk_that_is_full_at_any_flush_or_rename(tiny, monkeypatch, expected, name):
    """A disk may say so only then. Without links the checkpoint before the last one is moved."""
    calls = 0
    for n in range(1, 1000, 2):
        with monkeypatch.context() as patch:
            fault = FailingCall(patch, n, name)
            done = tiny.run(*START)
        if fault.hit is None:
            break
        calls += 1
        check_whole(tiny.folder)
        if name == "link":
            assert (done.code, done.err) == (0, "")
        elif (tiny.folder / "run").exists() and (tiny.folder / "run" / "config.json").exists():
            assert done.code in (1, 2)
            one_line(done, done.code, "No space left")
            resume(tiny, MODE[0])
        else:
            one_line(done, 2, "--run-dir run", "give another directory")
            assert tiny.run(*START).code == 0
        assert outcome(tiny.folder) == expected
        clear(tiny.folder)
    assert calls >= 3


def test_no_links_and_a_kill_between_two_renames(tiny, monkeypatch, expected):
    """For a moment there is no checkpoint.safetensors then, but the one before it."""
    replaced = 0
    original = os.replace

    def killed(source: Any, target: Any) -> None:
        nonlocal replaced
        if replaced and Path(target).name == "checkpoint.safetensors" and not os.path.lexists(target):
            raise KilledError
        replaced += Path(target).name == "checkpoint.previous.safetensors"
        original(source, target)

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            tiny.run(*START)
    assert "checkpoint.safetensors is missing; going on from the one before it" in resume(tiny, MODE[0]).out
    assert outcome(tiny.folder) == expected


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path, record_testsuite_property):
    """The limit is the system's own, RLIMIT_FSIZE: the kernel cuts a write short and then refuses it."""
    write_corpus(tmp_path / "corpus", train=20)
    rarely = ["--checkpoint-interval", "1000"]
    cases = [
        ("config.json", [], 1000),
        ("steps.jsonl", [*rarely, "--bptt", "1"], 4000),
        ("model.safetensors", rarely, 3500),
    ]
    cases += [("checkpoint.safetensors", [], limit) for limit in (4000, 8000, 12000)]
    with Forks() as forks:
        for name, flags, limit in cases:
            assert forks.run(tmp_path, *START, *flags).code == 0
            expected = outcome(tmp_path)
            clear(tmp_path)
            end = forks.run(tmp_path, *START, *flags, largest_file=limit)
            done = Done(end.code or 0, end.out, end.err)
            check_whole(tmp_path)
            if name == "config.json":
                one_line(done, 2, "--run-dir run", "File too large", "give another directory")
                assert not (tmp_path / "run").exists()
                continue
            one_line(done, 1, name, "File too large", "--resume run")
            end = forks.run(tmp_path, MODE[0], "--resume", "run")
            assert (end.code, end.err) == (0, "")
            assert outcome(tmp_path) == expected
            clear(tmp_path)
    record_testsuite_property("writes refused by the kernel", len(cases))


@pytest.fixture
def mounted(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`mount` with these options, at a folder "disk", which is the working directory."""
    disk = programs.folder / "disk"
    disk.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, "tmpfs", str(disk)], check=True, capture_output=True)  # noqa: S607

    try:
        mount("-t", "tmpfs", "-o", "size=512k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user cannot mount a tmpfs here: {error}")
    monkeypatch.chdir(disk)
    try:
        yield mount
    finally:
        os.chdir(programs.folder)
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607


@pytest.mark.slow
def test_a_small_disk(mounted, programs, record_testsuite_property):
    """A real one, with less and less room for the run."""
    write_corpus(Path("corpus"), train=20)
    assert programs.run(*START).code == 0
    expected = outcome(Path.cwd())
    clear(Path.cwd())
    codes = Counter()
    for pages in range(1, 60):
        with Path("filler").open("wb") as filler:
            room = os.statvfs(".").f_bavail - pages
            filler.write(b"x" * (4096 * room))
        done = programs.run(*START)
        codes[done.code] += 1
        Path("filler").unlink()
        check_whole(Path.cwd())
        if done.code == 0:
            break
        if done.code == 2:
            one_line(done, 2, "No space left")
            assert not Path("run").exists()
        else:
            one_line(done, 1, "No space left", "--resume run")
            resume(programs, MODE[0])
            assert outcome(Path.cwd()) == expected
        clear(Path.cwd())
    assert codes[0] == 1
    assert codes[1] > 5
    record_testsuite_property("full disks survived", codes[1])


def test_a_disk_that_becomes_read_only(mounted, programs, monkeypatch):
    """Before the run, at each of many moments of it, and until after the resume."""
    folder = Path.cwd()
    write_corpus(Path("corpus"), train=20)
    assert programs.run(*START).code == 0
    expected = outcome(folder)
    clear(folder)
    mounted("-o", "remount,ro")
    one_line(programs.run(*START), 2, "Read-only", "--save model.safetensors")
    mounted("-o", "remount,rw")
    original = lm.training.loop.Training.train_step
    for step in (1, 4, 9, 10, 17, 18):
        taken = 0

        def freeze(*args: Any, step: int = step) -> None:
            nonlocal taken
            taken += 1
            if taken == step:
                mounted("-o", "remount,ro")
            original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(lm.training.loop.Training, "train_step", freeze)
            one_line(programs.run(*START), 1, "Read-only", "--resume run")
        one_line(programs.run(MODE[0], "--resume", "run"), 2, "Read-only")
        mounted("-o", "remount,rw")
        check_whole(folder)
        resume(programs, MODE[0])
        assert outcome(folder) == expected
        clear(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES], ids=["read-only", "not permitted"])
def test_a_directory_that_can_no_longer_be_changed(tiny, monkeypatch, expected, number):
    """Root may write anywhere, so the refusals are made here: from each change on, in a run and in its resumes."""
    run = tiny.folder / "run"
    for n in range(1, 1000, 3):
        with monkeypatch.context() as patch:
            fault = ReadOnly(patch, n, number)
            done = tiny.run(*START)
        if fault.hit is None:
            break
        if (run / "config.json").exists() and done.code == 1:
            one_line(done, 1, os.strerror(number), "--resume run")
            with monkeypatch.context() as patch:
                ReadOnly(patch, 1 + n % 4, number)
                again = tiny.run(MODE[0], "--resume", "run")
            assert again.code in (1, 2)
            one_line(again, again.code, os.strerror(number))
            assert re.search(r"--resume run|--save model\.safetensors", again.err)
            resume(tiny, MODE[0])
        else:
            one_line(done, 2, os.strerror(number), "give")
            clear(tiny.folder)
            assert tiny.run(*START).code == 0
        assert outcome(tiny.folder) == expected
        check_whole(tiny.folder)
        clear(tiny.folder)
    assert n > 60


def test_a_full_disk_does_not_hide_why_a_run_ended(tiny, monkeypatch):
    """Here that it diverged."""
    tiny.spoil_gradients(set(range(1, 99)), "decoder.bias")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunDirectory, "write_result", full)
    one_line(tiny.run(*START, "--max-skipped", "4"), 1, "4 steps in a row")


@pytest.mark.slow
def test_an_output_that_is_full(tiny, expected):
    """`python main.py > log` on a full disk."""
    with Path("/dev/full").open("wb") as full:
        process = start(tiny.folder, *START, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=60)
    one_line(Done(process.returncode, "", err.decode()), 1, "standard output", "No space left", "--resume run")
    resume(tiny, MODE[0])
    assert outcome(tiny.folder) == expected
