"""Reads checkpoints that apex.fp16_utils wrote, without apex and without running code out of the file."""

import pickle
import re
from os import PathLike
from typing import IO, Any

import torch

from apex_compat.fp16_utils.policy import DYNAMIC_ARGS


class _Record:
    """Stands in for a pickled scaler. It takes the attributes and has no behaviour."""


SCALERS = (
    "apex.amp.scaler.LossScaler",
    "apex.fp16_utils.loss_scaler.LossScaler",
    "apex.fp16_utils.loss_scaler.DynamicLossScaler",
)
"""Names every scaler class whose instances ended up in such files. Nothing is imported by these names."""


def load_apex_checkpoint(path: str | PathLike[str] | IO[bytes], map_location: Any = "cpu") -> Any:
    """Load a file that torch.save wrote in a program with apex.fp16_utils.

        checkpoint = load_apex_checkpoint("checkpoint.pt")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])  # an FP16_Optimizer of this package

    torch's restricted unpickler (`weights_only=True`) reads the file. The scaler objects in it become the plain
    values that `FP16_Optimizer.load_state_dict` takes, with their window counters. The rest is returned as it
    was saved.

    Args:
        path: the file, or a binary file object.
        map_location: as for torch.load. It is "cpu" by default, since such files come from machines with CUDA.

    Raises:
        pickle.UnpicklingError: the file holds anything but tensors, plain values and apex's scalers, or
            torch.save did not write it. Nothing out of it has been executed.
        ValueError: a scaler lacks an attribute.
    """
    # Each name gets a class of its own: torch keeps the allowed names by class.
    stand_ins: list[Any] = [(type("_Record", (_Record,), {}), name) for name in SCALERS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's advice includes turning the protection off. Only its finding is shown.
        reason = re.search(r"Unsupported [^\n]*", str(error))
        raise pickle.UnpicklingError(
            f"{path} holds more than tensors, plain values and apex's loss scalers, which is all that is "
            f"loaded: {reason[0] if reason else 'it is not a checkpoint'}"
        ) from None
    return _without_records(checkpoint)


def _without_records(value: Any) -> Any:
    """Return `value` with each scaler in its dicts, lists and tuples turned into plain values."""
    if isinstance(value, _Record):
        return _plain(vars(value))
    if type(value) is dict:
        return {key: _without_records(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_records(item) for item in value)
    return value


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the state of `apex_compat.fp16_utils.policy` that a scaler's attributes describe."""
    try:
        if "_loss_scale" in attributes:
            return _plain_amp(attributes)
        if "scale_window" not in attributes:
            return {"loss_scale": float(attributes["cur_scale"])}
        since_overflow = attributes["cur_iter"] - 1 - attributes["last_overflow_iter"]
        return _dynamic(
            scale=attributes["cur_scale"],
            # This scaler counts all updates. It grows at each multiple of the window.
            good_updates=since_overflow % attributes["scale_window"],
            policy=(attributes["scale_factor"], attributes["scale_window"], 1.0, 2.0**127),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a loss scaler in the file lacks a usable attribute: {error}") from None


def _plain_amp(attributes: dict[str, Any]) -> dict[str, Any]:
    if not attributes.get("dynamic", True):
        return {"loss_scale": float(attributes["_loss_scale"])}
    return _dynamic(
        scale=attributes["_loss_scale"],
        good_updates=attributes["_unskipped"],
        # It ignored its factor argument: it always doubled and halved.
        policy=(
            2.0,
            attributes["_scale_seq_len"],
            attributes.get("_min_loss_scale"),
            attributes.get("_max_loss_scale", 2.0**24),
        ),
    )


def _dynamic(scale: Any, good_updates: Any, policy: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "loss_scale": float(scale),
        "good_updates": int(good_updates),
        **dict(zip(DYNAMIC_ARGS[1:], policy, strict=True)),
    }
