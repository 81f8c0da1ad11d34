"""Lists the functions of torch that O1 casts."""

import torch

from apex_compat.amp.compat import filter_attrs

MODULE = torch

FP16_FUNCS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc prelu
    addmm addmv addr matmul mm mv addbmm baddbmm bmm
""".split()  # noqa: SIM905  readable
"""Functions of matrix units, whose sums are fp32 inside."""

FP32_FUNCS = """
    acos asin cosh erfinv exp expm1 log log10 log2 reciprocal rsqrt sinh tan pow
    cumprod cumsum dist norm prod std sum var renorm
""".split()  # noqa: SIM905  readable
"""Functions that leave the range of half precision, or sum in it."""

# vdot came after apex. Spectral norm takes it of a half and an fp32 vector, where it took dot.
CASTS = "addcdiv addcmul atan2 cross bilinear dot vdot add div mul eq equal ge gt le lt ne".split()  # noqa: SIM905  readable
"""Functions whose arguments are promoted to the widest dtype."""

SEQUENCE_CASTS = ["cat", "stack"]
"""Functions of a sequence of tensors, which are promoted to the widest dtype."""

IN_PLACE_FP32_FUNCS = filter_attrs(MODULE, [f"{name}_" for name in FP32_FUNCS])
"""Functions that cannot return their result in float32."""
