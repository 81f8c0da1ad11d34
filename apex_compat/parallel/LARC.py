"""Scales the gradient of each layer by the norm of its weights: layer-wise adaptive rate control."""  # noqa: N999

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_compat.fp16_utils.wrapper import OptimizerWrapper


class LARC(OptimizerWrapper):
    """An optimizer that adapts each parameter's gradient before the wrapped optimizer's step.

    For a parameter p with gradient g, weight decay wd and learning rate lr (You, Gitman, Ginsburg 2017):

        rate = trust_coefficient * |p| / (|g| + wd * |p| + eps)
        rate = min(rate / lr, 1)                                with clip=True
        g = (g + wd * p) * rate

    A parameter keeps its gradient, without weight decay, if one of the two 2-norms is 0. The wrapped optimizer
    applies no weight decay of its own. Norms and rates are float32 for half-precision parameters.

    Args:
        optimizer: the optimizer to wrap. Groups, state and state_dict() stay its own.
        trust_coefficient: as above.
        clip: False scales by the rate itself, True bounds the learning rate by it.
        eps: as above.

    Attributes:
        optim: the wrapped optimizer.
    """

    def __init__(
        self, optimizer: Optimizer, trust_coefficient: float = 0.02, clip: bool = True, eps: float = 1e-8
    ) -> None:
        super().__init__(optimizer)
        self.optim = optimizer
        self.trust_coefficient = trust_coefficient
        self.clip = clip
        self.eps = eps

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Call the wrapped optimizer's zero_grad."""
        self.optim.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Call the wrapped optimizer's add_param_group."""
        self.optim.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Adapt the gradients in place and step.

        Args:
            closure: computes the gradients and returns the loss. It is called once.

        Returns:
            The return value of `closure`, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._without_weight_decay() as weight_decays:
            for group, weight_decay in zip(self.param_groups, weight_decays, strict=True):
                for param in group["params"]:
                    if param.grad is not None:
                        self._adapt(param, param.grad, group["lr"], weight_decay)
            self.optim.step()
        return loss

    @contextmanager
    def _without_weight_decay(self) -> Iterator[list[float]]:
        """Yield the weight decay of each group, which is 0 there in the meantime."""
        groups = [group for group in self.param_groups if "weight_decay" in group]
        before = [group["weight_decay"] for group in groups]
        every = [group.get("weight_decay", 0) for group in self.param_groups]
        try:
            for group in groups:
                group["weight_decay"] = 0
            yield every
        finally:
            for group, weight_decay in zip(groups, before, strict=True):
                group["weight_decay"] = weight_decay

    def _adapt(self, param: Tensor, grad: Tensor, lr: float | Tensor, weight_decay: float) -> None:
        dtype = torch.promote_types(param.dtype, torch.float32)
        p_norm, g_norm = (torch.linalg.vector_norm(t, dtype=dtype) for t in (param, grad))
        rate = self.trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + self.eps)
        if self.clip:
            rate = (rate / lr).clamp(max=1)
        adapted = (grad.to(dtype) + weight_decay * param.to(dtype)) * rate
        # No `if`: it would wait for the device once a parameter.
        grad.copy_(torch.where((p_norm != 0) & (g_norm != 0), adapted, grad.to(dtype)))

    def _get_state(self) -> dict[str, Any]:
        return self.optim.state_dict()

    def _set_state(self, state: dict[str, Any]) -> None:
        self.optim.load_state_dict(state)
