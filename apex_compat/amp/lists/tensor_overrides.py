"""Lists the methods of Tensor that O1 casts. See `torch_overrides` for the kinds."""

import torch

from apex_compat.amp.compat import filter_attrs
from apex_compat.amp.lists import torch_overrides

MODULE = torch.Tensor

FP16_FUNCS = ["__matmul__", *filter_attrs(MODULE, torch_overrides.FP16_FUNCS)]

FP32_FUNCS = ["__ipow__", "__pow__", "__rpow__", "cpu", *filter_attrs(MODULE, torch_overrides.FP32_FUNCS)]

_OPERATORS = """
    __add__ __div__ __eq__ __ge__ __gt__ __iadd__ __idiv__ __imul__ __isub__ __itruediv__ __le__ __lt__
    __mul__ __ne__ __radd__ __rdiv__ __rmul__ __rsub__ __rtruediv__ __sub__ __truediv__
""".split()  # noqa: SIM905  readable
CASTS = filter_attrs(MODULE, _OPERATORS + torch_overrides.CASTS)

IN_PLACE_FP32_FUNCS = filter_attrs(MODULE, [f"{name}_" for name in torch_overrides.FP32_FUNCS])
IN_PLACE_MATCHED_FUNCS = filter_attrs(
    MODULE, [f"{name}_" for name in torch_overrides.FP16_FUNCS + torch_overrides.CASTS]
)
