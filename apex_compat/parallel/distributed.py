"""Averages gradients over processes: by itself at the end of backward, or when it is asked to."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from apex_compat.fp16_utils.gradients import copy_values
from apex_compat.parallel.flat import (
    apply_flat_dist_call,
    extract_tensors,
    flat_dist_call,
    flatten,
    sendable,
    split_by_type,
    split_half_float_double,
    unflatten,
)

__all__ = [
    "DistributedDataParallel",
    "Reducer",
    "apply_flat_dist_call",
    "extract_tensors",
    "flat_dist_call",
    "flatten",
    "split_by_type",
    "split_half_float_double",
    "unflatten",
]


class DistributedDataParallel(nn.Module):
    """A module whose gradients are averaged over all processes at the end of each backward pass.

    The parameters of rank 0 are copied to the other ranks once, at construction. Buffers stay as they are.
    All gradients of one dtype are communicated together, when all of them are there. So a parameter may be
    unused, on some ranks or on all, and the module may be called several times before backward.

    A gradient g becomes sum(g / predivide) * (predivide / ranks), where the sum is over the ranks.

    Args:
        module: the module to wrap. It is called as it is.
        message_size: ignored: one message has all gradients of a dtype.
        delay_allreduce: ignored: communication is always at the end.
        shared_param: must be None.
        allreduce_trigger_params: ignored.
        retain_allreduce_buffers: ignored.
        allreduce_always_fp32: True sums float16 and bfloat16 gradients in float32.
        num_allreduce_streams: ignored.
        allreduce_communicators: ignored.
        gradient_average: False leaves out the factor (predivide / ranks).
        gradient_predivide_factor: `predivide` above.
        gradient_average_split_factor: ignored.
        prof: ignored.

    Attributes:
        module: the wrapped module.

    Raises:
        ValueError: `shared_param` is given, or `delay_allreduce` with `allreduce_trigger_params` or with several
            streams. No process group is initialized.
        TypeError: in backward, a gradient is sparse.
    """

    def __init__(
        self,
        module: nn.Module,
        message_size: int = 10000000,
        delay_allreduce: bool = False,
        shared_param: Any = None,
        allreduce_trigger_params: Iterable[Tensor] | None = None,
        retain_allreduce_buffers: bool = False,
        allreduce_always_fp32: bool = False,
        num_allreduce_streams: int = 1,
        allreduce_communicators: Any = None,
        gradient_average: bool = True,
        gradient_predivide_factor: float = 1.0,
        gradient_average_split_factor: float | None = None,
        prof: bool = False,
    ) -> None:
        super().__init__()
        if shared_param is not None:
            raise ValueError("shared_param is given; it must be None: a shared parameter needs no option")
        if delay_allreduce and allreduce_trigger_params is not None:
            raise ValueError("allreduce_trigger_params is given with delay_allreduce=True; leave one of them out")
        if delay_allreduce and num_allreduce_streams > 1:
            raise ValueError(
                f"num_allreduce_streams is {num_allreduce_streams} with delay_allreduce=True; leave one of them out"
            )
        self.module = module
        self.allreduce_always_fp32 = allreduce_always_fp32
        self.gradient_average = gradient_average
        self.gradient_predivide_factor = gradient_predivide_factor
        self.world_size = dist.get_world_size()
        self._disable_allreduce = False
        self._queued = False
        self._due = False
        self._touched: set[Tensor] = set()
        flat_dist_call([param.detach() for param in module.parameters()], dist.broadcast, (0,))
        _hook_parameters(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _hook_parameters(self)  # a copy has parameters of its own

    def enable_allreduce(self) -> None:
        """Average from the next backward on. It averages what gradients have gathered in the meantime, too."""
        self._disable_allreduce = False

    def disable_allreduce(self) -> None:
        """Let gradients accumulate locally, without communication, until `enable_allreduce`."""
        self._disable_allreduce = True

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the module's output for these arguments."""
        self._queued = self._due = False  # a backward that failed never came to its end
        output = self.module(*inputs, **kwargs)
        tensors: list[Tensor] = []
        extract_tensors(output, tensors)
        for tensor in tensors:
            # A checkpointed part runs a backward of its own. Its end is not the end; that of the output's is.
            # A leaf, such as a parameter that the module returns, and an input would keep a hook of each call.
            if tensor.grad_fn is not None and torch.is_grad_enabled():
                tensor.register_hook(self._queue)  # type: ignore[no-untyped-call]
        return output

    def _queue(self, _: Tensor) -> None:
        if not (self._queued or self._disable_allreduce):
            self._queued = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def _gradient_came(self, param: Tensor) -> None:
        self._touched.add(param)
        self._due = not self._disable_allreduce
        self._queue(param)

    @torch.no_grad()
    def _end_backward(self) -> None:
        self._queued = False
        if not self._due:  # torch.autograd.grad brings no parameter a gradient
            return
        self._due = False
        touched = {param for param in self._touched if param.grad is not None}
        self._touched = set()
        for name, param in self.module.named_parameters():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise TypeError(f"{name} has a sparse gradient; it must be dense (for an embedding: sparse=False)")
        for params in split_by_type(param for param in self.module.parameters() if param.requires_grad).values():
            self._allreduce(params, [param in touched for param in params])

    def _allreduce(self, params: list[Tensor], touched: list[bool]) -> None:
        """Reduce the gradients of `params`, tensors of one type.

        All ranks must send the same number of elements, so a missing gradient counts as 0. Behind the gradients
        goes who has one. A rank that lacks one waits for this answer: None stays None if no rank has a gradient.
        """
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
        # new_tensor waits for the device.
        users = grads[0].new_ones(len(params)) if all(touched) else grads[0].new_tensor(touched)
        flat = sendable(flatten([*grads, users]))
        if self.allreduce_always_fp32:
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        values, users = torch.split(flat, [flat.numel() - len(params), len(params)])
        if self.gradient_predivide_factor != 1:
            values.mul_(1 / self.gradient_predivide_factor)
        dist.all_reduce(flat)
        if self.gradient_average:
            values.mul_(self.gradient_predivide_factor / self.world_size)
        reduced = touched if all(touched) else users.bool().tolist()
        targets, sources = [], []
        for param, grad, value, is_reduced in zip(params, grads, unflatten(values, grads), reduced, strict=True):
            if is_reduced:
                param.grad = grad
                targets.append(grad)
                sources.append(value)
        copy_values(targets, sources)


def _hook_parameters(parallel: DistributedDataParallel) -> None:
    """Let each parameter tell `parallel`, while that exists, when it has got a gradient."""
    reference = weakref.ref(parallel)

    def tell(param: Tensor) -> None:
        if (listener := reference()) is not None:
            listener._gradient_came(param)

    for param in parallel.module.parameters():
        if param.is_floating_point() or param.is_complex():
            requires_grad = param.requires_grad
            # torch takes no hook of a frozen parameter, and keeps one that has it. It may be unfrozen later.
            param.requires_grad_(True)
            param.register_post_accumulate_grad_hook(tell)  # type: ignore[no-untyped-call]
            param.requires_grad_(requires_grad)


class Reducer:
    """Averages gradients over all processes when it is asked to.

    Args:
        module_or_grads_list: a module, whose parameters of rank 0 are copied to the other ranks now; or gradients,
            in nested lists or from an iterator.
    """

    def __init__(self, module_or_grads_list: Any) -> None:
        self._grads: Callable[[], list[Tensor]]
        if isinstance(module_or_grads_list, nn.Module):
            module = module_or_grads_list
            flat_dist_call([param.detach() for param in module.parameters()], dist.broadcast, (0,))
            self._grads = lambda: [param.grad for param in module.parameters() if param.grad is not None]
        else:
            grads: list[Tensor] = []
            extract_tensors(list(module_or_grads_list), grads)
            self._grads = lambda: grads

    def reduce(self) -> None:
        """Replace each gradient by its mean over the ranks. All ranks must have the same ones."""
        flat_dist_call(self._grads(), dist.all_reduce)
