"""No test finds torch as another one has set it: runs with --deterministic or --tf32 set switches of the process."""

import os
from contextlib import suppress

import pytest
import torch

from switches import ATTRIBUTES, CUBLAS, switches, switches_kept

AT_FIRST = switches()


def turn_all() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ[CUBLAS] = ":4096:8"
    for place, name in ATTRIBUTES:
        setattr(place, name, not getattr(place, name))


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


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has no such name"
)
def test_the_newer_names_of_tf32_can_be_mixed_in() -> None:
    """After them torch refuses to read the older names, until these are set."""
    with switches_kept():
        for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            place.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="allow_tf32"):
            switches()
    assert switches() == AT_FIRST
