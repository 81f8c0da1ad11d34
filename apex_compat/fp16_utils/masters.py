"""Keeps the master weights, and passes gradients and weights between masters and model."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_compat.fp16_utils import gradients
from apex_compat.fp16_utils.checks import HALF_DTYPES, check_dtypes


class Masters:
    """The master weights of an optimizer's half-precision parameters.

    In the optimizer's groups each float16 or bfloat16 parameter is replaced by its master, a leaf tensor in
    fp32. An fp32 parameter stays where it is and is its own master.

    A frozen parameter (requires_grad=False, no gradient) has a master too, since it may be unfrozen later. Until
    then nothing is written to the parameter. Its master follows what the parameter is given, such as a moving
    average or pretrained weights.

    The gradients in the model stand at some loss scale. Those of fp32 parameters stand at 1 once they are
    unscaled in place. This class keeps account of both, so that a further backward pass adds like to like.

    Args:
        optimizer: the wrapped optimizer. Its groups and state are changed as described.
        device: where the loss scale is.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._half_groups: list[list[Tensor]] = []
        self._master_groups: list[list[Tensor]] = []
        self._half: list[Tensor] = []
        self._masters: list[Tensor] = []
        self._own: list[Tensor] = []
        self._frozen: set[Tensor] = set()  # at the last update
        self._all_float16 = True
        self._one = torch.ones((), dtype=torch.float32, device=device)
        # None: no gradient has been made since the last zero_grad.
        self._half_grads_scale: Tensor | None = None
        self._own_grads_scale: Tensor | None = None
        self.adopt(*optimizer.param_groups)

    def checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `group` with a list of parameters, to be added to the optimizer.

        Raises:
            TypeError: a parameter is not float16, bfloat16 or float32.
            ValueError: a parameter has a master already.
        """
        given = group["params"]
        listed = [given] if isinstance(given, Tensor) else list(given)
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]  # they may be named
        check_dtypes("param_group", params)
        known = {id(p) for p in self._half}
        if any(id(p) in known for p in params):
            raise ValueError("param_group has a parameter of another group; each may be in one group only")
        return {**group, "params": listed}

    def adopt(self, *groups: dict[str, Any]) -> None:
        """Replace the half-precision parameters in `groups` by masters, and move their state to these in fp32.

        Args:
            groups: of the optimizer's own groups, all that still hold half-precision parameters.
        """
        state_moved = [self._adopt(group) for group in groups]
        if any(state_moved):
            # Loading casts state to its parameter's dtype by the optimizer's own rules: to half, were one left half.
            self._optimizer.load_state_dict(self._optimizer.state_dict())
        self._half = list(chain.from_iterable(self._half_groups))
        self._masters = list(chain.from_iterable(self._master_groups))
        self._all_float16 = all(p.dtype == torch.float16 for p in self._half)
        known = {id(m) for m in self._masters}
        self._own = [p for p in self._all_params() if id(p) not in known]

    def _adopt(self, group: dict[str, Any]) -> bool:
        """Make the masters of one group; return whether state was moved to them."""
        masters, state_moved = replace_by_masters(self._optimizer, group, lambda half: half.detach().float())
        self._frozen.update(filter(is_frozen, masters))
        self._half_groups.append(list(masters))
        self._master_groups.append(list(masters.values()))
        return state_moved

    def _all_params(self) -> list[Tensor]:
        """Return the tensors that the optimizer updates, in its order. A parameter given twice is there once."""
        return list(dict.fromkeys(p for group in self._optimizer.param_groups for p in group["params"]))

    def all_grads(self) -> list[Tensor]:
        """Return the gradients that the optimizer will see, in its order; the values of sparse ones."""
        return [gradients.dense(p.grad) for p in self._all_params() if p.grad is not None]

    def by_group(self) -> list[list[Tensor]]:
        """Return the masters, detached, group by group."""
        self._follow_frozen()
        return [[master.detach() for master in group] for group in self._master_groups]

    def trainable_by_group(self) -> list[list[Tensor]]:
        """Return the masters of parameters that require grad, detached, group by group.

        apex.fp16_utils made no others.
        """
        pairs = (zip(*groups, strict=True) for groups in zip(self._half_groups, self._master_groups, strict=True))
        return [[master.detach() for half, master in group if half.requires_grad] for group in pairs]

    @torch.no_grad()
    def load(self, targets: list[list[Tensor]], saved: list[list[Tensor]]) -> None:
        """Copy `saved` into `targets`, then all masters into the model.

        Args:
            targets: masters as `by_group` or `trainable_by_group` returned them.
            saved: tensors of the same shapes.
        """
        gradients.copy_values(list(chain.from_iterable(targets)), list(chain.from_iterable(saved)))
        gradients.copy_values(self._half, self._masters)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Copy the masters, rounded, to the parameters that were not frozen at the last update."""
        copy_to_unfrozen(self._half, self._masters, self._frozen)

    @torch.no_grad()
    def _follow_frozen(self) -> None:
        """Copy frozen parameters to their masters. A master that still rounds to its parameter keeps its bits."""
        for half, master in zip(self._half, self._masters, strict=True):
            if half in self._frozen or is_frozen(half):
                master.copy_(followed(master, half))

    @torch.no_grad()
    def zero_model_grads(self, drop: bool) -> None:
        """Zero the gradients of the model's half-precision parameters, or set them to None.

        Sparse gradients are always dropped: their indices would stay, and on the CPU torch cannot add to them in
        float16. The gradients of parameters that were frozen since are dropped too: momentum and weight decay
        would move weights for zeros.

        Args:
            drop: True sets all to None.
        """
        for param in self._half:
            sparse = param.grad is not None and param.grad.layout != torch.strided
            if drop or sparse or not param.requires_grad:
                param.grad = None
        if grads := [p.grad for p in self._half if p.grad is not None]:
            torch._foreach_zero_(grads)
        self._half_grads_scale = self._own_grads_scale = None

    @torch.no_grad()
    def bring_grads_to(self, scale: Tensor) -> None:
        """Multiply the gradients that earlier backward passes left in the model so that they stand at `scale`.

        Nothing is multiplied where the gradients were dropped or zeroed after the last step. Without this, a
        second `backward` would add gradients times the scale to unscaled ones.

        Args:
            scale: float32, shape ().
        """
        for params, old_scale in ((self._half, self._half_grads_scale), (self._own, self._own_grads_scale)):
            if old_scale is not None and old_scale is not scale:
                grads = (gradients.dense(p.grad) for p in params if p.grad is not None)
                gradients.rescale_(grads, old_scale, scale)
        self._half_grads_scale = self._own_grads_scale = scale

    @torch.no_grad()
    def update_grads(self, scale: Tensor, check: bool) -> Tensor:
        """Copy the half gradients to the masters and unscale all gradients.

        Args:
            scale: float32, shape (): where gradients that did not come through `bring_grads_to` stand.
            check: True looks for inf and nan.

        Returns:
            float32, shape (), on the device of `scale`: 1. if there was an inf or nan before or after
            unscaling, else 0.
        """
        self._frozen = frozen_now(self._half, self._masters, self._frozen)
        gradients.copy_to_masters(self._half, self._masters)
        gradients.coalesce(self._own)
        self._half_grads_scale = scale if self._half_grads_scale is None else self._half_grads_scale
        own_grads_scale = scale if self._own_grads_scale is None else self._own_grads_scale
        found_inf = torch.zeros_like(scale)
        for params, stand_at, narrow in (
            (self._masters, self._half_grads_scale, self._all_float16),
            (self._own, own_grads_scale, False),
        ):
            grads = [gradients.dense(p.grad) for p in params if p.grad is not None]
            inv_scale = gradients.reciprocal(stand_at)
            if check:
                found_inf = gradients.unscale_(grads, inv_scale, found_inf, narrow)
            else:
                gradients.multiply_(grads, inv_scale)
        self._own_grads_scale = self._one
        return found_inf


def replace_by_masters(
    optimizer: Any, group: dict[str, Any], new_master: Callable[[Tensor], Tensor]
) -> tuple[dict[Tensor, Tensor], bool]:
    """Replace the half-precision parameters in one of the optimizer's groups by masters, and move their state.

    The state keeps its dtype.

    Args:
        optimizer: a torch optimizer, or anything with its attribute `state`.
        group: one of its groups.
        new_master: makes a detached fp32 tensor for a parameter.

    Returns:
        The master of each half-precision parameter, and True if state was moved.
    """
    masters: dict[Tensor, Tensor] = {}
    state_moved = False
    # In place: LBFGS keeps a reference to this list.
    params = group["params"]
    for i, param in enumerate(params):
        if param.dtype not in HALF_DTYPES:
            continue
        if param not in masters:
            masters[param] = new_master(param).requires_grad_()
        params[i] = masters[param]
        if param in optimizer.state:
            optimizer.state[params[i]] = optimizer.state.pop(param)
            state_moved = True
    return masters, state_moved


def followed(fp32: Tensor, half: Tensor) -> Tensor:
    """Return `half` as float32. An element of `fp32` that rounds to that of `half` keeps its bits."""
    return torch.where(fp32.to(half.dtype) == half, fp32, half.float())


def is_frozen(half: Tensor) -> bool:
    """Return True if no step may change `half`: it requires no gradient, and has none from before."""
    return not half.requires_grad and half.grad is None


@torch.no_grad()
def frozen_now(halves: Sequence[Tensor], masters: Sequence[Tensor], before: set[Tensor]) -> set[Tensor]:
    """Return the frozen ones of `halves`. Give the master of each that was unfrozen the values that it has now.

    Args:
        halves: half-precision parameters.
        masters: their masters.
        before: those that were frozen when this was called last.
    """
    for half, master in zip(halves, masters, strict=True) if before else ():
        if half in before and not is_frozen(half):
            master.copy_(followed(master, half))
    return set(filter(is_frozen, halves))


@torch.no_grad()
def copy_to_unfrozen(halves: Sequence[Tensor], masters: Sequence[Tensor], frozen: set[Tensor]) -> None:
    """Copy the masters, rounded, to those of their parameters `halves` that are not in `frozen`."""
    pairs = [(half, master) for half, master in zip(halves, masters, strict=True) if half not in frozen]
    gradients.copy_values([half for half, _ in pairs], [master for _, master in pairs])
