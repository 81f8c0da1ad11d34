"""Runs code written for CUDA on a machine without it."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from time import perf_counter
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

    - `.cuda()` of tensors, storages and modules, any `device` argument that names CUDA, and `map_location`. A bare
      number is taken for a CUDA device in `x.to(0)` alone.
    - The tensor types of torch.cuda, and the functions in it that training scripts call. Events take the time of the
      host. Streams do nothing, since the CPU does one thing after the other.
    - `init_process_group("nccl")` takes gloo, and torch's DistributedDataParallel no device numbers.

    `torch.cuda.is_available()` still returns False. Graphs, `torch.Generator("cuda")` and other threads than the one
    that enters are left alone.
    """
    # Optimizers import it, and it looks torch.cuda's functions up by identity: it must see the real ones.
    importlib.import_module("torch._dynamo")
    replaced: dict[str, Any] = {name: getattr(torch, name) for name in TENSOR_TYPES}
    replaced |= dict.fromkeys(DO_NOTHING, _do_nothing)
    replaced |= {
        "Event": _Event,
        "Stream": _Stream,
        "current_device": lambda: 0,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "device": nullcontext,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "CPU",
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "stream": nullcontext,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **replaced))
        for name in NVTX:
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name, _do_nothing))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "cuda", _same))
        stack.enter_context(mock.patch.object(torch.TypedStorage, "cuda", _same))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", _do_nothing))
        stack.enter_context(mock.patch.object(torch, "load", _loads_on_cpu(torch.load)))
        if torch.distributed.is_available():
            _patch_distributed(stack)
        stack.enter_context(_CudaToCpu())
        yield


DO_NOTHING = (
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_peak_memory_stats",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "synchronize",
)
NVTX = ("mark", "range_pop", "range_push")


def _patch_distributed(stack: ExitStack) -> None:
    for name in ("init_process_group", "new_group"):
        function = getattr(torch.distributed, name)
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            stack.enter_context(mock.patch.object(module, name, _through_gloo(function)))
    parallel = torch.nn.parallel.DistributedDataParallel
    init = parallel.__init__

    @wraps(init)
    def without_devices(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        init(self, module, None, None, *args, **kwargs)

    stack.enter_context(mock.patch.object(parallel, "__init__", without_devices))


def _through_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace NCCL, which needs CUDA, in the arguments of a function that makes a process group."""

    @wraps(function)
    def through_gloo(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        changed = {key: _gloo(value) for key, value in kwargs.items()}
        return function(*(_gloo(value) for value in args), **changed)

    return through_gloo


def _gloo(value: Any) -> Any:
    return "gloo" if isinstance(value, str) and "nccl" in value.lower() and "://" not in value else value


def _loads_on_cpu(load: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.load put what was saved on CUDA on the CPU. A function as map_location decides itself."""

    @wraps(load)
    def load_on_cpu(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(file, map_location if callable(map_location) else "cpu", *args, **kwargs)

    return load_on_cpu


class _Event:
    """Stands for a CUDA event: all work before it is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        """Return the milliseconds from this event to `end`."""
        return 1000 * (end._seconds - self._seconds)

    def query(self) -> bool:
        """Return True: nothing is left to do."""
        return True

    def synchronize(self) -> None:
        """Do nothing."""

    wait = synchronize


class _Stream(nullcontext[None]):
    """Stands for a CUDA stream. It waits for nothing: all work is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def record_event(self, event: _Event | None = None) -> _Event:
        """Return `event`, or a new one, at the present time."""
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        """Return True: nothing is left to do."""
        return True

    def synchronize(self, *args: Any) -> None:
        """Do nothing."""

    wait_event = wait_stream = synchronize


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


def _same(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the storage itself."""
    return value


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a function that concerns a CUDA device."""
