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
        complain(str(error))
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
        complain(own(message))
        return RunError.exit_code


def complain(message: str) -> None:
    """Print `message` on stderr as an error; in a distributed run, once for all processes that find the same."""
    from lm import distributed  # which needs this module

    distributed.once(message, lambda: print(f"error: {message}", file=sys.stderr, flush=True))


def own(message: str) -> str:
    """`message` of an error that one process of a distributed run has for itself, with the name of that process."""
    return f"rank {os.environ['RANK']}: {message}" if "TORCHELASTIC_RUN_ID" in os.environ else message


def printable(text: object, limit: int = 200) -> str:
    """`text` as one line of at most `limit` characters in which a terminal finds nothing to obey."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
