"""What goes wrong for a user, as one line and an exit code instead of a traceback."""

import os
import sys
from collections.abc import Callable


class UsageError(Exception):
    """What was asked for cannot be done. The text is one line: what was given, what is allowed, what to do."""

    exit_code = 2


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
        print(f"error: {_rank()}{str(error).splitlines()[0]}", file=sys.stderr)
        return RunError.exit_code


def _rank() -> str:
    """Which process of a distributed run speaks."""
    return f"rank {os.environ['RANK']}: " if "TORCHELASTIC_RUN_ID" in os.environ else ""
