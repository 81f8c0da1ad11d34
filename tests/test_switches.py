"""No test finds torch as another one has set it: runs with --deterministic or --tf32 set switches of the process."""

import os
from contextlib import suppress

import pytest
import torch

from switches import ATTRIBUTES, CUBLAS, switches, switches_kept

AT_FIRST = switches()


def turn_all() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ[CUBLAS] = ":16:8"
    for place, name in ATTRIBUTES:
        value = getattr(place, name)
        setattr(place, name, not value if isinstance(value, bool) else "ieee" if value == "tf32" else "tf32")


def test_all_are_put_back() -> None:
    with suppress(KeyboardInterrupt), switches_kept():
        turn_all()
        assert all(now != before for now, before in zip(switches(), AT_FIRST, strict=True))
        raise KeyboardInterrupt
    assert switches() == AT_FIRST


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_starts_with_the_first_settings(turn: str) -> None:
    """Whichever of the two comes later in this process has the other one before it."""
    assert switches() == AT_FIRST
    turn_all()
