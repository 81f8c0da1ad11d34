"""The end of a trainer, in one process or in several: an exit code, and one line on stderr if something failed."""

from collections.abc import Callable

from lm.training import distributed
from roundoff import program


def exit_code(main: Callable[[], int]) -> int:
    """Run `main` as `roundoff.program.exit_code` does; print an error that all processes find only once."""
    return program.exit_code(main, _complain_once)


def _complain_once(message: str) -> None:
    distributed.once(message, lambda: program.print_error(message))
