"""Holds the state of amp in this process, which scripts read and write under its apex names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class AmpState:
    """Holds what `amp.initialize` leaves for the other functions of amp.

    Attributes:
        hard_override: True turns the errors of forbidden overrides into printed warnings.
        allow_incoming_model_not_fp32: True lets `initialize` take a model with half-precision parameters.
        verbosity: 0 prints nothing, 1 the options and each overflow, 2 each cast of O1 too.
        min_loss_scale, max_loss_scale: the bounds of dynamic loss scales.
        loss_scalers: a `LossScaler` for each loss. It is empty before `initialize`, and if that had enabled=False.
        opt_properties: the `Properties` of the last `initialize`. Missing before the first.
        handle: the `AmpHandle` or `NoOpHandle` of O1 or `amp.init`. Missing before the first.
    """

    opt_properties: Any
    handle: Any

    def __init__(self) -> None:
        self.hard_override = False
        self.allow_incoming_model_not_fp32 = False
        self.verbosity = 1
        self.min_loss_scale: float | None = None
        self.max_loss_scale = 2.0**24
        self.loss_scalers: list[Any] = []


_amp_state = AmpState()


@contextmanager
def restored_after_an_error() -> Iterator[None]:
    """Give `_amp_state` back what it had, if this context is left by an exception."""
    before = dict(vars(_amp_state))
    try:
        yield
    except BaseException:
        vars(_amp_state).clear()
        vars(_amp_state).update(before)
        raise


def warn_or_err(message: str) -> None:
    """Raise RuntimeError with `message`, or print it as a warning if `_amp_state.hard_override`."""
    if not _amp_state.hard_override:
        raise RuntimeError(message)
    print(f"Warning:  {message}")


def maybe_print(message: str, rank0: bool = False) -> None:
    """Print `message` if `_amp_state.verbosity` is above 0.

    Args:
        message: one line or several.
        rank0: True prints on the first rank of a distributed run alone.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if _amp_state.verbosity > 0 and not (rank0 and distributed and torch.distributed.get_rank() != 0):
        print(message)


def master_params(optimizer: Any) -> Iterator[Tensor]:
    """Yield the parameters that `optimizer` updates: the fp32 masters under O2, once it has made them."""
    for group in optimizer.param_groups:
        yield from group["params"]
