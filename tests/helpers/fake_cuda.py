"""A GPU of fake tensors, for a machine that has none: which tensors go where, in which dtype, and what waits.

`fake_cuda` runs a block under torch's `FakeTensorMode`: tensors on `cuda:0` have a device, a dtype and a shape, and no
numbers. Operators are dispatched as on a GPU, autograd and autocast included, and a `Recorder` notes each. What a
kernel computes is not seen, nor which kernel CUDA's own code would choose, nor its time. Where torch's C++ asks for
CUDA by name it goes another way: dropout and attention are their plain operators, not the fused ones.

The rest of this file is what stands in for a GPU, each with its reason: `FAKE_KERNELS` for operators, `RECURRENT` for
cuDNN's layers, `_GPU` for functions of torch, `_FOR_CPP` and `_device_guards` for what C++ asks.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.backends.cudnn.rnn import get_cudnn_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switches import switches_kept

CUDA = torch.device("cuda:0")
aten = torch.ops.aten

WHY_NOT = ""
"""Why there can be no GPU of fake tensors here; empty where there can."""
if torch.cuda.is_available():
    WHY_NOT = "this machine has a GPU, for which nothing needs to stand in"
elif torch.version.cuda or torch.version.hip:
    WHY_NOT = "what stands in is made for a torch that was built without CUDA"
elif sys.platform != "linux":
    WHY_NOT = "libc10.so, whose device guards are needed, is a file of Linux"

# --- what is seen


class Seen(NamedTuple):
    """A tensor that an operator took or returned."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Operation(NamedTuple):
    """An operator that was dispatched."""

    name: str
    phase: str
    launches: bool
    """False: a view, or memory alone"""
    taken: list[Seen]
    returned: list[Seen]

    @property
    def devices(self) -> set[str]:
        """The devices of all its tensors that have elements."""
        return {seen.device for seen in self.taken + self.returned if 0 not in seen.shape}

    @property
    def off_gpu(self) -> list[Seen]:
        """Its tensors with elements that are not on the GPU."""
        return [seen for seen in self.taken + self.returned if seen.device != str(CUDA) and 0 not in seen.shape]


class RecurrentCall(NamedTuple):
    """A call of torch.lstm and the like: what cuDNN is given."""

    phase: str
    dtypes: frozenset[torch.dtype]
    dropout: float
    layers: int
    is_flat: bool


class Recorder(TorchDispatchMode):
    """Notes every operator, the waits among them, and every call of a recurrent layer.

    Attributes:
        phase: what the operators belong to that are dispatched now.
        operations: all of them, in order; views and questions about a tensor are among them.
        waits: operators for which the host waits until the GPU has come so far, each with its phase.
        recurrent: the calls of recurrent layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.operations: list[Operation] = []
        self.waits: list[tuple[str, str]] = []
        self.recurrent: list[RecurrentCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # C++ asks
            device = args[0].fake_device
            return _FOR_CPP if device.type == "cuda" else device
        if kwargs.get("device") == _FOR_CPP:
            kwargs = kwargs | {"device": CUDA}
        taken = [_seen(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = str(func).removesuffix(".default")
        if _waits(name, taken, args, kwargs):  # noted first: fake tensors may have no answer, and raise
            self.waits.append((name, self.phase))
        result = self._run(func, args, kwargs)
        returned = [_seen(x) for x in tree_leaves(result) if isinstance(x, Tensor)]
        launches = not func.is_view and not name.startswith(MEMORY)
        self.operations.append(Operation(name, self.phase, launches, taken, returned))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:  # a fake tensor has no number to give
            (tensor,) = args
            return {torch.bool: True, torch.int64: 1, torch.int32: 1}.get(tensor.dtype, 1.0)
        fake_kernel = FAKE_KERNELS.get(func)
        return fake_kernel(*args, **kwargs) if fake_kernel else func(*args, **kwargs)

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Let the operators of the block belong to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def of(self, *phases: str) -> list[Operation]:
        """The operations of these phases."""
        return [operation for operation in self.operations if operation.phase in phases]

    def launches(self, *phases: str) -> list[str]:
        """The operators of these phases that launch at least one kernel."""
        return [operation.name for operation in self.of(*phases) if operation.launches]


MEMORY = ("aten.empty", "aten.new_empty", "aten.lift_fresh", "aten._unsafe_view", "aten.set_")
"""Operators without a kernel, beside views."""


def _seen(tensor: Tensor) -> Seen:
    return Seen(str(tensor.device), tensor.dtype, tuple(tensor.shape))


# --- what makes the host wait

SIZE_IS_AN_ANSWER = {
    "aten.nonzero",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_consecutive",
    "aten.repeat_interleave.Tensor",
    "aten.equal",
    "aten.is_nonzero",
}
"""Operators that read the GPU's memory to say how large their result is, or whether."""


def _waits(name: str, taken: list[Seen], args: Any, kwargs: Any) -> bool:
    devices = {seen.device for seen in taken if 0 not in seen.shape}
    on_gpu = str(CUDA) in devices
    if name in SIZE_IS_AN_ANSWER or name == "aten._local_scalar_dense":
        return on_gpu
    if name.startswith(("aten.index.", "aten.index_put")) and on_gpu:  # by a mask: nonzero, in disguise
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if "copy" in name and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
        target = {str(kwargs["device"])} if kwargs.get("device") else set()
        return devices | target == {"cpu", str(CUDA)}  # either way
    return False


# --- what stands in for a GPU


def _nothing(*_: Any, **__: Any) -> None:
    """An optimizer's kernel: it returns nothing, and there are no numbers to change."""


def _cudnn_rnn(*args: Any) -> tuple[Tensor, ...]:
    """Torch's own fake kernel returns the buffer of flat weights that it was given, which may be none."""
    input, _, _, buffer, hx, cx, _, hidden_size, *_ = args
    output = input.new_empty(*input.shape[:2], hidden_size)
    cy = input.new_empty(0) if cx is None else torch.empty_like(cx)
    reserve = input.new_empty(0, dtype=torch.uint8)
    return output, torch.empty_like(hx), cy, reserve, input.new_empty(0) if buffer is None else buffer


def _cudnn_rnn_backward(*args: Any) -> tuple[Any, ...]:
    input, weights, _, _, hx, cx, *_ = args
    grad_cx = None if cx is None else torch.empty_like(cx)
    return torch.empty_like(input), torch.empty_like(hx), grad_cx, [torch.empty_like(w) for w in weights]


FAKE_KERNELS: dict[Any, Callable[..., Any]] = {
    aten._fused_sgd_.default: _nothing,  # torch has none
    aten._cudnn_rnn.default: _cudnn_rnn,  # torch's fails without a buffer
    aten._cudnn_rnn_backward.default: _cudnn_rnn_backward,  # torch has none
}
"""Operators whose fake kernel is missing in torch, or is of no use here."""

RECURRENT = {"lstm": 2, "gru": 3, "rnn_tanh": 1, "rnn_relu": 0}
"""torch's recurrent functions, and how cuDNN numbers them."""


def _recurrent(recorder: Recorder, mode: int) -> Callable[..., Any]:
    """Stand in for a function of `RECURRENT`, whose C++ asks whether torch was built with cuDNN, and takes it then.

    Under autocast it casts everything to float16, whatever autocast's dtype is: so torch does on a GPU
    (ATen/cudnn/AutocastRNN.cpp), in a file that is not in a torch for CPUs.
    """

    def layers(
        input: Tensor,
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        states = list(hx) if isinstance(hx, list | tuple) else [hx]
        if torch.is_autocast_enabled("cuda"):
            input, *states = (x.to(torch.float16) for x in (input, *states))
            weights = [w.to(torch.float16) for w in weights]
        dtypes = frozenset(x.dtype for x in (input, *states, *weights))
        recorder.recurrent.append(RecurrentCall(recorder.phase, dtypes, dropout, num_layers, _are_flat(weights)))
        h, c = (*states, None)[:2]
        output, h, c, *_ = torch._cudnn_rnn(
            input, list(weights), 4, None, h, c, mode, h.size(-1), 0, num_layers, batch_first, dropout, train,
            bidirectional, [], None,
        )  # fmt: skip
        return (output, h, c) if mode == RECURRENT["lstm"] else (output, h)

    return layers


def _are_flat(weights: Any) -> bool:
    """Return whether `weights` lie side by side in one storage, so that cuDNN takes them as they are."""
    storages = {w.untyped_storage()._cdata for w in weights}
    first, end = min(w.storage_offset() for w in weights), max(w.storage_offset() + w.numel() for w in weights)
    return len(storages) == 1 and end - first == sum(w.numel() for w in weights)


def _flatten_weight(weights: Any, *_: Any) -> Tensor:
    """Stand in for `torch._cudnn_rnn_flatten_weight`: let `weights` be views of one storage."""
    flat = weights[0].new_empty(sum(w.numel() for w in weights))
    for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.set_(part.view_as(weight))
    return flat


def _swap(a: Tensor, b: Tensor) -> None:
    """Stand in for `torch.utils.swap_tensors`, by which a module of fake tensors moves to another device or dtype.

    torch's refuses where a weak reference is, and has no reason to here: fake tensors know each other by them.
    """
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def _address(tensor: Tensor) -> int:
    """Stand in for `Tensor.data_ptr`: like it, equal where the storage and the place in it are."""
    return int(tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size())


_RANDOM_STATE = torch.zeros(16, dtype=torch.uint8)

_GPU: dict[str, Any] = {
    "torch.cuda.is_available": lambda: True,  # GradScaler and autocast ask, and disable themselves
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.set_device": _nothing,
    "torch.cuda.init": _nothing,
    "torch.cuda._lazy_init": _nothing,
    "torch.cuda._exchange_device": lambda _: 0,
    "torch.cuda._maybe_exchange_device": lambda _: 0,
    "torch.cuda.is_bf16_supported": lambda *_: True,
    "torch.cuda.get_device_name": lambda *_: "a GPU of fake tensors",
    "torch.cuda.get_rng_state": lambda *_: _RANDOM_STATE,
    "torch.cuda.set_rng_state": _nothing,
    "torch.cuda.max_memory_allocated": lambda *_: 0,
    "torch.version.cuda": "13.0",
    "torch.backends.cudnn.is_acceptable": lambda t: t.is_cuda and t.dtype in torch.backends.cudnn.CUDNN_TENSOR_DTYPES,
    "torch.backends.cudnn.version": lambda: 91300,
    "torch._use_cudnn_rnn_flatten_weight": lambda: True,
    "torch._cudnn_rnn_flatten_weight": _flatten_weight,
    "torch.utils.swap_tensors": _swap,
}
"""What asks for a real GPU -> what answers."""

_FOR_CPP = torch.device("xla:0")
"""What C++ is told of a tensor on the GPU. Autograd wants a stream of CUDA's, which a torch for CPUs has not, and
autocast casts what is on CUDA or on XLA, which has no streams. Python is told `cuda:0`."""


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Run the block with a GPU of fake tensors, `cuda:0`, and yield what notes its operators."""
    recorder, fake = Recorder(), FakeTensorMode(allow_non_fake_inputs=True)
    with monkeypatch.context() as patch:
        for name, value in _GPU.items():
            patch.setattr(name, value)
        modes = SimpleNamespace(RNNMode=SimpleNamespace(**RECURRENT))
        patch.setitem(get_cudnn_mode.__globals__, "_cudnn", modes)  # of a module that hides behind another
        for name, mode in RECURRENT.items():
            patch.setattr(f"torch.{name}", _recurrent(recorder, mode))
            patch.setattr(f"torch._VF.{name}", _recurrent(recorder, mode))
        patch.setattr(FakeTensorMode, "avoid_device_init", True)
        patch.setattr(FakeTensor, "is_cuda", property(lambda t: t.device.type == "cuda"), raising=False)
        patch.setattr(FakeTensor, "data_ptr", _address, raising=False)
        with switches_kept(), _device_guards(), torch.autograd.set_multithreading_enabled(False), fake, recorder:
            yield recorder


@contextmanager
def _device_guards() -> Iterator[None]:
    """Give C++ the device guard of the meta device, which does nothing, for CUDA and for `_FOR_CPP`.

    In a torch that was built with CUDA, FakeTensorMode does the like.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, xla, meta = 1, 9, 14  # c10/core/DeviceType.h
    before = guards[cuda], guards[xla]
    guards[cuda] = guards[xla] = guards[meta]
    try:
        yield
    finally:
        guards[cuda], guards[xla] = before
