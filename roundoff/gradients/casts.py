"""Let an unmodified model and loss run in the reference's dtype, and draw the same random numbers in every mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASTS: Any = (Tensor.float, Tensor.half, Tensor.bfloat16)
_DRAWN: Any = (torch.rand, torch.randn)
_DRAWN_LIKE: Any = (torch.rand_like, torch.randn_like)
_DRAWN_IN_PLACE: Any = (
    *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.log_normal_, Tensor.cauchy_),
    *(torch.nn.init.normal_, torch.nn.init.uniform_),
)


class SameDraws(TorchFunctionMode):
    """Draws random numbers in fp32 and then casts them, since torch draws others in each dtype.

    Dropout needs no help: its masks are alike in every dtype on one device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or draw in its place."""
        kwargs = kwargs or {}
        if func in _DRAWN or func in _DRAWN_LIKE:
            like = args[0].dtype if func in _DRAWN_LIKE else torch.get_default_dtype()
            dtype = kwargs.get("dtype") or like
            if dtype in _FLOATING and "out" not in kwargs:
                return func(*args, **kwargs | {"dtype": torch.float32}).to(dtype)
        if func in _DRAWN_IN_PLACE and args and args[0].dtype in _FLOATING:
            drawn = func(torch.empty_like(args[0], dtype=torch.float32), *args[1:], **kwargs)
            with torch.no_grad():
                return args[0].copy_(drawn)
        return func(*args, **kwargs)


class Wide(SameDraws):
    """Keeps everything in `dtype` where a model or a loss asks for a narrower one, as by `.float()`.

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
        if func is not Tensor.view:  # which reads a tensor's bits as those of another dtype
            args = tuple(self._widened(value) for value in args)
            kwargs = {name: self._widened(value) for name, value in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)

    def _widened(self, value: Any) -> Any:
        return self._dtype if isinstance(value, torch.dtype) and value in self._narrow else value


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Return `batch` with its floating tensors in `dtype`; in tuples, lists and mappings, however deep."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named one
        return type(batch)(*(cast(part, dtype) for part in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(cast(part, dtype) for part in batch)
    if isinstance(batch, Mapping):
        return {name: cast(part, dtype) for name, part in batch.items()}
    return batch
