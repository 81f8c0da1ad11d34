"""Moves the loss scale of `FP16_Optimizer`: static, or dynamic as apex.amp's scaler really ran.

Both policies keep the scale in a float32 tensor of shape () on the parameters' device. They update it there, so
that a training step never waits for the device. An update replaces that tensor: a scale that was read earlier
keeps its value.
"""

from typing import Any

import torch
from torch import Tensor

from apex_compat.fp16_utils.checks import SMALLEST_SCALE, checked_count, checked_factor, checked_scale

LARGEST_COUNT = 2**31 - 1
"""Bounds the count of good updates, an int32. With a longer window the scale never grows."""


class StaticScale:
    """A loss scale that changes by `set` alone.

    Attributes:
        scale: float32, shape (), on the parameters' device.
    """

    dynamic = False

    def __init__(self, scale: float, device: torch.device) -> None:
        self.scale = torch.full((), scale, dtype=torch.float32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Do nothing. A static scale does not react to overflow."""

    def state_dict(self) -> dict[str, Any]:
        """Return {"loss_scale": float}."""
        return {"loss_scale": self.scale.item()}

    def set(self, value: float) -> None:
        """Make `value` the scale."""
        self.scale = torch.full_like(self.scale, value)


class DynamicScale:
    """A loss scale that shrinks on overflow and grows after `scale_window` updates in a row without one.

    This is the policy of apex.amp's scaler, with `scale_factor` honoured. An update does this:

    1. On overflow, scale = max(scale / scale_factor, min_loss_scale), and the count of good updates is 0.
    2. Otherwise the count grows by one. When it reaches `scale_window`,
       scale = min(scale * scale_factor, max_loss_scale), and the count is 0.

    The scale starts at `init_scale`, moved into [min_loss_scale, max_loss_scale].

    Args:
        device: where the scale is kept.
        init_scale: the first scale, from 2**-100 to 2**127.
        scale_factor: greater than 1.
        scale_window: a positive int, in updates.
        min_loss_scale: None stands for 2**-100. The scale never reaches 0, from which it could not come back.
        max_loss_scale: not below `min_loss_scale`.

    Attributes:
        scale: float32, shape (), on `device`.
        good_updates: int32, shape (), on `device`; the updates without overflow since the scale last moved.

    Raises:
        TypeError, ValueError: an argument is not such a number.
    """

    dynamic = True

    def __init__(
        self,
        device: torch.device,
        init_scale: float = 2.0**16,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        min_loss_scale: float | None = None,
        max_loss_scale: float = 2.0**24,
    ) -> None:
        self.scale_factor = checked_factor("scale_factor", scale_factor)
        self.scale_window = checked_count("scale_window", scale_window, smallest=1)
        self.max_loss_scale = checked_scale("max_loss_scale", max_loss_scale)
        self.min_loss_scale = min_loss_scale
        if min_loss_scale is not None:
            self.min_loss_scale = checked_scale("min_loss_scale", min_loss_scale)
            if self.min_loss_scale > self.max_loss_scale:
                raise ValueError(
                    f"min_loss_scale is {min_loss_scale!r}; it must not exceed max_loss_scale, {max_loss_scale!r}"
                )
        start = min(max(checked_scale("init_scale", init_scale), self._floor), self.max_loss_scale)
        self.scale = torch.full((), start, dtype=torch.float32, device=device)
        self.good_updates = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def _floor(self) -> float:
        return SMALLEST_SCALE if self.min_loss_scale is None else self.min_loss_scale

    def update(self, found_inf: Tensor) -> None:
        """Move the scale as the class describes.

        Args:
            found_inf: float32, shape (), on the scale's device; 1. for an overflow, else 0.
        """
        overflow = found_inf.bool()
        count = self.good_updates + 1
        grows = count >= min(self.scale_window, LARGEST_COUNT)
        reduced = (self.scale / self.scale_factor).clamp(min=self._floor)
        grown = (self.scale * self.scale_factor).clamp(max=self.max_loss_scale)
        self.scale = torch.where(overflow, reduced, torch.where(grows, grown, self.scale))
        self.good_updates = torch.where(overflow | grows, torch.zeros_like(count), count)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, the count of good updates and the policy's parameters, all plain numbers."""
        return {
            "loss_scale": self.scale.item(),
            "good_updates": int(self.good_updates.item()),
            "scale_factor": self.scale_factor,
            "scale_window": self.scale_window,
            "min_loss_scale": self.min_loss_scale,
            "max_loss_scale": self.max_loss_scale,
        }

    def set(self, value: float) -> None:
        """Make `value` the scale. The count of good updates goes on."""
        self.scale = torch.full_like(self.scale, value)


DYNAMIC_ARGS = ("init_scale", "scale_factor", "scale_window", "min_loss_scale", "max_loss_scale")


def new_policy(dynamic: bool, static_scale: Any, args: Any, device: torch.device) -> StaticScale | DynamicScale:
    """Build the policy that a caller described by the arguments of `FP16_Optimizer`.

    Args:
        dynamic: as `dynamic_loss_scale`.
        static_scale: as `static_loss_scale`; ignored where `dynamic`.
        args: as `dynamic_loss_args`; ignored unless `dynamic`.
        device: where the scale goes.

    Raises:
        TypeError, ValueError: the argument that counts is not allowed.
    """
    if not dynamic:
        return StaticScale(checked_scale("static_loss_scale", static_scale), device)
    if args is not None and not isinstance(args, dict):
        raise TypeError(f"dynamic_loss_args is {args!r}; it must be None or a dict with keys of {DYNAMIC_ARGS}")
    for key in args or {}:
        if key not in DYNAMIC_ARGS:
            raise ValueError(f"dynamic_loss_args has the key {key!r}; the keys allowed are {DYNAMIC_ARGS}")
    return DynamicScale(device, **(args or {}))


def policy_from_state(state: Any, device: torch.device) -> StaticScale | DynamicScale:
    """Build the policy that the `state_dict` of either class describes.

    Raises:
        TypeError: `state` is not a dict. It is usually a scaler object out of a checkpoint of apex.
        ValueError: a key is missing or unknown, or a value is out of range.
    """
    if not isinstance(state, dict):
        raise TypeError(
            f"state['loss_scaler'] is a {type(state).__name__}; it must be a dict of plain values. "
            "Read a checkpoint that apex wrote with apex_compat.load_apex_checkpoint(path)"
        )
    if set(state) == {"loss_scale"}:
        return StaticScale(checked_scale("state['loss_scaler']['loss_scale']", state["loss_scale"]), device)
    expected = {"loss_scale", "good_updates", *DYNAMIC_ARGS} - {"init_scale"}
    if set(state) != expected:
        raise ValueError(
            f"state['loss_scaler'] has the keys {sorted(map(str, state))}; it must have {sorted(expected)}"
        )
    scale = checked_scale("state['loss_scaler']['loss_scale']", state["loss_scale"])
    count = checked_count("state['loss_scaler']['good_updates']", state["good_updates"], smallest=0)
    args = {key: state[key] for key in DYNAMIC_ARGS if key != "init_scale"}
    policy = DynamicScale(device, init_scale=scale, **args)
    policy.set(scale)
    policy.good_updates.fill_(count)
    return policy
