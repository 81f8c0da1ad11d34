"""End a program: make one line on stderr and an exit code of what went wrong, in place of a traceback."""

import os
import sys
from collections.abc import Callable

from roundoff.errors import RunError, UsageError


def exit_code(main: Callable[[], int], complain: Callable[[str], object] | None = None) -> int:
    """Run `main`; pass what went wrong to `complain` as one line and return the exit code.

    That is the code of a UsageError or RunError, and 1 when the disk or the memory is full. Ctrl-C outside
    training, where nothing is left to finish, gives 130, and a closed pipe 141, as in a shell. By default `complain`
    prints the line on stderr.
    """
    complain = complain or print_error
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


def print_error(message: str) -> None:
    """Print `message` on stderr as an error."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def own(message: str) -> str:
    """Return `message`, which one process of a distributed run has for itself, with the name of that process."""
    return f"rank {os.environ['RANK']}: {message}" if "TORCHELASTIC_RUN_ID" in os.environ else message
