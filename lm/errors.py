"""What goes wrong for a user, as one line and an exit code instead of a traceback."""

import sys
from collections.abc import Callable


class UsageError(Exception):
    """What was asked for cannot be done. The text is one line: what was given, what is allowed, what to do."""

    exit_code = 2


class RunError(Exception):
    """A run that was rightly asked for has failed. The text is one line: what happened, and what to try."""

    exit_code = 1


def exit_code(main: Callable[[], int]) -> int:
    """Run `main`; print a UsageError or RunError on stderr as one line and return its exit code.

    Ctrl-C outside training, where nothing is left to finish, gives 130 as in a shell.
    """
    try:
        return main()
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
