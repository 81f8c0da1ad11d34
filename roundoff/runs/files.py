"""Write files whole or not at all, and lock directories so that one process at a time writes there."""

import glob
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from roundoff.errors import UsageError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="only soft file lock is available")  # on a Python without fcntl
    from filelock import lock_descriptor

BESIDE = ".tmp"
"""The end of the name of a file that is being written."""
LOCK = ".lock"
"""The file of a directory's lock on Windows, which cannot open a directory."""
WINDOWS = os.name == "nt"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Let `write` fill a file beside `path`, then put that file in place in one step.

    Whoever reads `path`, also after a crash or a power cut, finds the old content or the new, never a part. A link
    stays a link. The old content goes to `keep`, if that is given, and not before the new is on the disk. What
    killed writers have left beside `path` is removed.

    Raises:
        OSError: `path` cannot be written; it is the error's `filename`.
    """
    with naming(path):
        path = path.resolve()
        remove_leftovers(path.parent, path.name)
        handle, beside = _create_beside(path)
        try:
            with os.fdopen(handle, "wb") as file:  # open, and so locked, until the name is gone
                write(file)
                sync(file)
                umask = os.umask(0)
                os.umask(umask)
                beside.chmod(0o666 & ~umask)  # as open() would have made it; mkstemp's are private
                if keep is not None and path.exists():
                    _keep(path, keep)
                if WINDOWS:  # it renames no open file
                    file.close()
                beside.replace(path)
            sync_directory(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError name `path`. A write or a flush names no file, and other calls name the file beside it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def remove_leftovers(directory: Path, name: str | None = None) -> None:
    """Remove the files that killed writers have left in `directory`; with a `name`, those beside that file alone.

    A living writer has its file open and locked: Windows removes no open file, and elsewhere the lock shows.
    """
    for leftover in directory.glob(f".{'*' if name is None else glob.escape(name)}.*{BESIDE}"):
        with suppress(OSError):  # gone by now, or another user's
            if WINDOWS:
                leftover.unlink()
                continue
            handle = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if lock_descriptor(handle, blocking=False):
                    leftover.unlink()
            finally:
                os.close(handle)


def _create_beside(path: Path) -> tuple[int, Path]:
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=BESIDE)
        with suppress(OSError):  # no locks on this file system: leftovers stay there
            lock_descriptor(handle)
        if os.path.lexists(name):
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before the lock was on it


def _keep(path: Path, keep: Path) -> None:
    keep.unlink(missing_ok=True)
    try:
        os.link(path, keep)  # so that `path` is there at every moment
    except OSError:  # a file system without hard links
        path.replace(keep)


def sync(file: IO[bytes]) -> None:
    """Return once what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Return once the names in the directory are on the disk. Before that, a power cut loses a rename.

    Windows has no such call.
    """
    if WINDOWS:
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_writable(flag: str, path: Path, make_folder: bool = False) -> None:
    """Raise UsageError, naming `flag`, unless a file `path` can be written. Leave nothing behind.

    With `make_folder` its folder may be missing, since who writes the file makes it.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "a device or pipe, which writing would replace"
        raise UsageError(f"{flag} {path} is {kind}; give the name of a file")
    folder, there = path.parent, target.parent
    while make_folder and not os.path.lexists(there) and there != there.parent:
        folder = there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: cannot write in {folder} ({error.strerror}); give a place that you can write to"
        ) from None


def lock(directory: Path) -> int | None:
    """Take `directory` for this process, and return the lock's file descriptor for `unlock`.

    The system lets go of the lock with the last process that has the descriptor, however that process ends. Nothing
    guards a directory where the file system knows no locks, as some network ones do not: then return None.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT) if WINDOWS else os.open(directory, os.O_RDONLY)
    try:
        taken = lock_descriptor(handle, blocking=False)
    except OSError:
        os.close(handle)
        return None
    if not taken:
        os.close(handle)
        raise BlockingIOError(f"{directory} is locked")
    return handle


def unlock(handle: int | None) -> None:
    """Let go of what `lock` returned."""
    if handle is not None:
        os.close(handle)
