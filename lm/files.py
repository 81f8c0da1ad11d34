"""Files that are written whole or not at all, and directories that one process at a time may write to."""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lm.errors import UsageError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place in one step.

    Whoever reads `path`, also after a crash or a power cut, finds the old content or the new, never a part. A link
    stays a link.
    """
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            sync(file)
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # as open() would have made it; mkstemp's are private
        beside.replace(path)
        sync_directory(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
