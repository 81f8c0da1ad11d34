"""What the optimizers have in common: which gradients a step takes, the state, and both layouts of checkpoints."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from apex_compat.optimizers.formulas import widened


class Work(NamedTuple):
    """Holds what a step does in one group: the parameters that have a gradient, and these in fp32 or wider."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]


class FusedOptimizer(Optimizer):
    """Takes steps over lists of tensors. A subclass says how in `_update`.

    Parameters may lie on any devices, in any floating dtype. A group counts its steps in group['step'], as apex
    does, and not each parameter for itself as torch does.
    """

    counts_steps = False
    """True if the formula needs the number of the step."""
    fp32_state: frozenset[str] = frozenset()
    """Names the state that is fp32 for half-precision parameters too. Other state has its parameter's dtype."""
    instead = "torch.optim.SGD"
    """Names the optimizer that takes sparse gradients."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], set_grad_none: bool, amsgrad: bool = False) -> None:
        if amsgrad:
            raise RuntimeError(f"{type(self).__name__} has no AMSGrad variant: use torch.optim.AdamW(amsgrad=True)")
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none

    def _update(self, work: list[Work]) -> None:
        """Change parameters and state in place."""
        raise NotImplementedError

    def _holders(self) -> dict[Tensor, Tensor]:
        """Return the parameters whose gradient another tensor holds, each with that tensor."""
        return {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step and return what `closure` returns, which is called first, with gradients enabled.

        Raises:
            RuntimeError: a gradient is sparse. Nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        holders = self._holders()
        work = [self._work(group, holders) for group in self.param_groups]
        if self.counts_steps:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
        self._update(work)
        return loss

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Set all gradients to None or to zero: as `set_to_none` says, or else as `set_grad_none` does."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned here, in apex, or in torch's optimizer of the same formula.

        State that is fp32 here is not rounded to the dtype of its parameter. A step count that torch keeps for each
        parameter becomes that of the group: the largest one.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for param, key in zip(params, saved, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name in self.state[param]:
                    # A copy also where the dtype fits: torch would share it with whoever gave it.
                    self.state[param][name] = value.detach().to(param.device, self._dtype(param, name), copy=True)
        if self.counts_steps:
            for group in self.param_groups:
                self._take_group_step(group)

    def _take_group_step(self, group: dict[str, Any]) -> None:
        steps = [self.state[p].pop("step") for p in group["params"] if "step" in self.state.get(p, {})]
        if "step" in group:
            steps = [group["step"]]
        if steps:
            group["step"] = max(int(step) for step in steps)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # torch's groups and older ones have other names

    def __getstate__(self) -> dict[str, Any]:
        settings = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        return settings | super().__getstate__()  # a copy takes its settings with it

    def _work(self, group: dict[str, Any], holders: dict[Tensor, Tensor]) -> Work:
        params, grads = [], []
        for param in group["params"]:
            grad = holders.get(param, param).grad
            if grad is None or grad.numel() == 0:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} was given a sparse gradient: use {self.instead}")
            params.append(param)
            grads.append(grad)
        return Work(group, params, widened(grads))

    def _dtype(self, param: Tensor, name: str) -> torch.dtype:
        return torch.promote_types(param.dtype, torch.float32) if name in self.fp32_state else param.dtype

    def _states(self, params: list[Tensor], name: str) -> list[Tensor]:
        """Return this state of each of `params`. One that has none yet gets zeros."""
        for param in params:
            if self.state[param].get(name) is None:
                zeros = torch.zeros_like(param, dtype=self._dtype(param, name), memory_format=torch.preserve_format)
                self.state[param][name] = zeros
        return [self.state[param][name] for param in params]
