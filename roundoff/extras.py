"""The optional packages: a missing one becomes one line that says what to install."""

from collections.abc import Iterator
from contextlib import contextmanager

from roundoff.errors import UsageError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages of the extra `extra` in this block.

    Raises:
        UsageError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UsageError(f"{package} is not installed: pip install 'roundoff[{extra}]'") from None
