"""The optional packages: a missing one becomes one line that says what to install."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from roundoff.errors import UsageError

REPORT = ("matplotlib", "plotly", "scipy", "tabulate")
"""The packages of the extra `report`."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages of the extra `extra` in this block.

    Raises:
        UsageError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(str(error.name).partition(".")[0], extra) from None


def require_report() -> None:
    """Check that the packages of the extra `report` are there, without their import, which takes time and memory.

    Runs and probes may take hours, and should not end in a missing package.

    Raises:
        UsageError: one of them is not installed.
    """
    for package in REPORT:
        if find_spec(package) is None:
            raise _missing(package, "report")


def _missing(package: str, extra: str) -> UsageError:
    """Return the error of a missing package."""
    return UsageError(f"{package} is not installed: pip install 'roundoff[{extra}]'")
