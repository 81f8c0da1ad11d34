"""The stock modes: precision management for any model by name, over any optimizer.

name           weights  masters  loss scale               products
fp32           fp32     -        -                        fp32
masters-fp16   fp16     fp32     128                      fp16
masters-bf16   bf16     fp32     -                        bf16
amp-fp16       fp32     -        dynamic, from 2**16 on   fp16 where autocast has it so
amp-bf16       fp32     -        -                        bf16 where autocast has it so
bf16-weights   bf16     -        -                        bf16
apex-o1        fp32     -        dynamic, from 2**16 on   fp16 where apex's O1 has it so
apex-o2        fp16     fp32     dynamic, from 2**16 on   fp16; BatchNorm in fp32

`fp16` and `bf16` alone mean autocast, as elsewhere.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from apex_compat.fp16_utils import convert_network, prep_param_lists
from roundoff.apex_amp import AmpPrecision
from roundoff.errors import UsageError
from roundoff.precision import Autocast, MasterWeights, Precision

Build = Callable[..., Precision]
"""Makes of a fresh model all that manages its precision: `build(model) -> Precision`.

The stock ones take an optimizer too: `build(model, lambda params: torch.optim.AdamW(params, lr=3e-4))`.
"""

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

LR = 0.1
STATIC_SCALE = 128.0


def sgd(params: list[nn.Parameter]) -> Optimizer:
    """Return plain SGD over `params`, with a learning rate of 0.1."""
    return torch.optim.SGD(params, lr=LR)


def _fp32(model: nn.Module, optimizer: MakeOptimizer = sgd) -> Precision:
    params = _trained(model)
    return MasterWeights(params, optimizer(params))


def _masters(dtype: torch.dtype, loss_scale: float) -> Build:
    def build(model: nn.Module, optimizer: MakeOptimizer = sgd) -> Precision:
        convert_network(model, dtype)  # but for BatchNorm, whose statistics half cannot hold
        params, masters = prep_param_lists(model)
        return MasterWeights(params, optimizer(masters), loss_scale)

    return build


def _bf16_weights(model: nn.Module, optimizer: MakeOptimizer = sgd) -> Precision:
    params = _trained(model.bfloat16())
    return MasterWeights(params, optimizer(params))


def _amp(dtype: torch.dtype) -> Build:
    def build(model: nn.Module, optimizer: MakeOptimizer = sgd) -> Precision:
        return Autocast(optimizer(_trained(model)), dtype=dtype)

    return build


def _apex(opt_level: str) -> Build:
    def build(model: nn.Module, optimizer: MakeOptimizer = sgd) -> Precision:
        return AmpPrecision(model, optimizer(_trained(model)), opt_level)

    return build


STOCK: Mapping[str, Build] = {
    "fp32": _fp32,
    "masters-fp16": _masters(torch.float16, STATIC_SCALE),
    "masters-bf16": _masters(torch.bfloat16, 1.0),
    "amp-fp16": _amp(torch.float16),
    "amp-bf16": _amp(torch.bfloat16),
    "bf16-weights": _bf16_weights,
    "apex-o1": _apex("O1"),
    "apex-o2": _apex("O2"),
}
SHORT = {"fp16": "amp-fp16", "bf16": "amp-bf16"}


def named(modes: Sequence[str | Build] | Mapping[str, str | Build]) -> dict[str, Build]:
    """Return name -> build of `modes`: names of stock modes, or a mapping from names to those or to any `Build`.

    Raises:
        UsageError: there are none, or one is no stock mode.
    """
    if isinstance(modes, str) or not modes:
        raise UsageError(f"modes is {modes!r}; give a list of {', '.join(STOCK)}, or a dict of name -> build")
    if isinstance(modes, Mapping):
        return {name: build if callable(build) else stock(build) for name, build in modes.items()}
    names = [_name(mode) for mode in modes]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"modes names {', '.join(repeated)} twice; give each once, or a dict of name -> build")
    return {name: mode if callable(mode) else stock(mode) for name, mode in zip(names, modes, strict=True)}


def _name(mode: Any) -> str:
    if not callable(mode):
        return str(mode)
    name = str(getattr(mode, "__name__", "<lambda>"))
    if name == "<lambda>":
        raise UsageError("modes has a build without a name; give a dict of name -> build")
    return name


def stock(name: str) -> Build:
    """Return the stock mode `name`.

    Raises:
        UsageError: there is none of that name.
    """
    found = STOCK.get(SHORT.get(name, name))
    if found is None:
        near = difflib.get_close_matches(str(name), [*STOCK, *SHORT], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"mode {name!r} is no stock mode; {hint}there are {', '.join(STOCK)}, or give a build")
    return found


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def floating(parameters: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype of most numbers in `parameters`; float32 where none is floating."""
    sizes: dict[torch.dtype, int] = {}
    for p in parameters:
        if p.is_floating_point():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
