"""Let an unmodified model and loss run in the reference's dtype, and draw the same random numbers in every mode."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_CASTS: Any = (Tensor.float, Tensor.half, Tensor.bfloat16)
_TO_ANOTHERS: Any = (Tensor.to, Tensor.type_as)
_LEGACY = {f"torch.{name}Tensor" for name in ("Float", "Half", "BFloat16")}
_DRAWN: Any = (torch.rand, torch.randn)
_DRAWN_LIKE: Any = (torch.rand_like, torch.randn_like)
_DRAWN_FROM: Any = (torch.normal, torch.bernoulli, Tensor.bernoulli)
_DRAWN_IN_PLACE: Any = (
    *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.log_normal_, Tensor.cauchy_, Tensor.bernoulli_),
    *(torch.nn.init.normal_, torch.nn.init.uniform_),
)


class SameDraws(TorchFunctionMode):
    """Draws random numbers in fp32 and then casts them, since torch draws others in each dtype.

    Dropout needs no help: its masks are alike in every dtype on one device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or draw in its place."""
        kwargs = kwargs or {}
        if func in _DRAWN or func in _DRAWN_LIKE or func in _DRAWN_FROM:
            out = kwargs.get("out")
            likes = [x for x in (out, *args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            dtype = kwargs.get("dtype") or (likes[0].dtype if likes else torch.get_default_dtype())
            if dtype in _FLOATING:
                drawn = _drawn_in_fp32(func, args, {name: value for name, value in kwargs.items() if name != "out"})
                with torch.no_grad():
                    return drawn.to(dtype) if out is None else out.resize_(drawn.shape).copy_(drawn)
        if func in _DRAWN_IN_PLACE and args and args[0].dtype in _FLOATING:
            place = torch.empty_like(args[0], dtype=torch.float32)
            drawn = _drawn_in_fp32(func, (place, *args[1:]), kwargs)
            with torch.no_grad():
                return args[0].copy_(drawn)
        return func(*args, **kwargs)


def _drawn_in_fp32(func: Any, args: Any, kwargs: Any) -> Tensor:
    def in_fp32(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    named = {name: in_fp32(value) for name, value in kwargs.items()}
    if func not in _DRAWN_IN_PLACE and func not in (torch.bernoulli, Tensor.bernoulli):
        named |= {} if func is torch.normal and any(isinstance(x, Tensor) for x in args) else {"dtype": torch.float32}
    drawn: Tensor = func(*map(in_fp32, args), **named)
    return drawn


class Wide(SameDraws):
    """Keeps everything in `dtype` where a model or a loss asks for a narrower one, as by `.float()`.

    `dtype` is the default meanwhile, which torch keeps for the whole process: other threads see it, too.

    Args:
        dtype: float64 or float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._narrow = _FLOATING[: _FLOATING.index(dtype)]

    def __enter__(self) -> Any:
        """Make `dtype` the default, too."""
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Put back what was the default."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with the wide dtype in the place of each narrower one."""
        kwargs = kwargs or {}
        if func in _CASTS:
            return super().__torch_function__(Tensor.to, types, (args[0], self._dtype), kwargs)
        if func in _TO_ANOTHERS and len(args) > 1 and isinstance(args[1], Tensor) and args[1].dtype in self._narrow:
            return super().__torch_function__(
                Tensor.to, types, (args[0], args[1].device, self._dtype, *args[2:]), kwargs
            )
        if func is Tensor.type and len(args) > 1 and _legacy(args[1]) in _LEGACY:
            return super().__torch_function__(Tensor.to, types, (args[0], self._dtype), {})
        if func is not Tensor.view:  # which reads a tensor's bits as those of another dtype
            args = tuple(self._widened(value) for value in args)
            kwargs = {name: self._widened(value) for name, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, torch.dtype):
            return value
        if value in (torch.complex32, torch.complex64):
            return _COMPLEX[self._dtype]
        return self._dtype if value in self._narrow else value


def _legacy(value: Any) -> str:
    """Return the name of a type such as torch.FloatTensor, which `Tensor.type` takes too."""
    return value if isinstance(value, str) else f"{getattr(value, '__module__', '')}.{getattr(value, '__name__', '')}"


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Return a copy of `batch`, so that nobody else sees it change, with its floating tensors in `dtype`."""

    def fresh(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

    return each_tensor(batch, fresh)


def each_tensor(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `do` of each tensor in its place, in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one
        return type(value)(*(each_tensor(part, do) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(part, do) for part in value)
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)  # of its own type, such as Hugging Face's, whose entries are attributes too
        for name, part in value.items():
            copied[name] = each_tensor(part, do)
        return copied
    if isinstance(value, Mapping):
        return {name: each_tensor(part, do) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: each_tensor(getattr(value, name), do) for name in fields})
    return value
