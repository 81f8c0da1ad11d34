"""What goes wrong for a user, as one line and an exit code instead of a traceback."""

import os
import sys
from collections.abc import Callable


class UsageError(Exception):
    """What was asked for cannot be done. The text is one line: what was given, what is allowed, what to do."""

    exit_code = 2


class BadFileError(ValueError):
    """A file is not what it should be. The text is one line: what is wrong with it."""


class RunError(Exception):
    """A run that was rightly asked for has failed. The text is one line: what happened, and what to try."""

    exit_code = 1


def exit_code(main: Callable[[], int]) -> int:
    """Run `main`; print what went wrong on stderr as one line and return the exit code.

    That is the code of a UsageError or RunError, and 1 when the disk or the memory is full. Ctrl-C outside
    training, where nothing is left to finish, gives 130, and a closed pipe 141, as in a shell.
    """
    try:
        return main()
    except (UsageError, RunError) as error:
        print(f"error: {_rank()}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's allocators raise these
            raise
        message = (str(error).splitlines() or ["out of memory"])[0]  # Python's own MemoryError has no text
        print(f"error: {_rank()}{message}", file=sys.stderr)
        return RunError.exit_code


def _rank() -> str:
    """Which process of a distributed run speaks."""
    return f"rank {os.environ['RANK']}: " if "TORCHELASTIC_RUN_ID" in os.environ else ""


def printable(text: object, limit: int = 200) -> str:
    """`text` as one line of at most `limit` characters in which a terminal finds nothing to obey."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
