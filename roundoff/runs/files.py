"""Files that are written whole or not at all, and directories that one process at a time may write to."""

import fcntl
import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from roundoff.errors import UsageError

BESIDE = ".tmp"
"""How the name of a file ends that is being written."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Let `write` fill a file beside `path`, then put it in place in one step.

    Whoever reads `path`, also after a crash or a power cut, finds the old content or the new, never a part. A link
    stays a link. The old content goes to `keep`, if that is given, and not before the new is on the disk. What a
    writer that was killed has left beside `path` is removed.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    with naming(path):
        path = path.resolve()
        remove_leftovers(path)
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
                beside.replace(path)
            sync_directory(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError name `path`: those of a write or a flush name no file, and others the file beside it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` that were killed have left beside it; living ones hold a lock on theirs."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{BESIDE}"):
        with suppress(OSError):  # locked, gone by now, or another user's
            handle = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(handle)


def _create_beside(path: Path) -> tuple[int, Path]:
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=BESIDE)
        with suppress(OSError):  # no locks on this file system: leftovers stay there
            fcntl.flock(handle, fcntl.LOCK_EX)
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
    """Return once the names in the directory are on the disk: a rename is lost in a power cut before that."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_writable(flag: str, path: Path) -> None:
    """Raise UsageError, naming `flag`, unless a file `path` can be written; leaves nothing behind."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "a device or pipe, which writing would replace"
        raise UsageError(f"{flag} {path} is {kind}; give the name of a file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: cannot write in {path.parent} ({error.strerror}); give a place that you can write to"
        ) from None


def lock(directory: Path) -> int | None:
    """Take `directory` for this process and return the lock's file descriptor.

    The system lets go of the lock when the descriptor is closed, which a process's death does. None where the
    file system knows no locks, as some network ones do not: there nothing is guarded.

    Raises:
        BlockingIOError: another process holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle
