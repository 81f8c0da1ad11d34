"""Runs code written for CUDA on a machine without it."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TENSOR_TYPES = (
    "BFloat16Tensor",
    "BoolTensor",
    "ByteTensor",
    "CharTensor",
    "DoubleTensor",
    "FloatTensor",
    "HalfTensor",
    "IntTensor",
    "LongTensor",
    "ShortTensor",
)


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Give the CPU to whatever asks for CUDA within this context.

    It replaces `.cuda()` of tensors and modules, and any `device` argument that names CUDA. A bare number is
    taken for a CUDA device in `x.to(0)` alone. It also replaces the tensor types of torch.cuda, and
    `torch.cuda.synchronize`, `set_device` and `current_device`.

    `torch.cuda.is_available()` still returns False. Streams, events and NCCL are not replaced.
    """
    # Optimizers import it, and it looks torch.cuda's functions up by identity: it must see the real ones.
    importlib.import_module("torch._dynamo")
    replaced: dict[str, Any] = {name: getattr(torch, name) for name in TENSOR_TYPES}
    replaced["synchronize"] = _do_nothing
    replaced["set_device"] = _do_nothing
    replaced["current_device"] = lambda: 0
    with mock.patch.multiple(torch.cuda, **replaced), _CudaToCpu():
        yield


class _CudaToCpu(TorchFunctionMode):
    """Changes the devices in each call of a torch function."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.cuda, Tensor.pin_memory):
            return args[0]
        if func is Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], "cpu", *args[2:])  # a bare number means a CUDA device
        changed = {key: _on_cpu(value) for key, value in (kwargs or {}).items()}
        return func(*(_on_cpu(value) for value in args), **changed)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str):
        if value == "cuda" or value.startswith("cuda:"):
            return "cpu"
        if value.startswith("torch.cuda."):
            return value.replace("torch.cuda.", "torch.", 1)
    return value


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a function that concerns a CUDA device."""
