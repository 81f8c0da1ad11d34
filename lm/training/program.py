"""How a trainer ends, in one process or in several."""

from collections.abc import Callable

from lm.training import distributed
from roundoff import program


def exit_code(main: Callable[[], int]) -> int:
    """Run `main` as `roundoff.program.exit_code` does; of an error that all processes find, print one line."""
    return program.exit_code(main, _complain_once)


def _complain_once(message: str) -> None:
    distributed.once(message, lambda: program.print_error(message))
