"""The functions that O1 casts, as apex's documentation and users know them, and a call of each."""

from typing import NamedTuple

import torch
from torch import Tensor

from amp_cases import OWNERS


def names(text, owner="Tensor"):
    """Return the names of `text` that `owner` has; torch's tensors lack some functions of torch."""
    return [name for name in text.split() if hasattr(OWNERS[owner], name)]


HALF = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc prelu addmm addmv addr
    matmul mm mv addbmm baddbmm bmm"""
HALF_F = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc linear"
FLOAT = """acos asin cosh erfinv exp expm1 log log10 log2 reciprocal rsqrt sinh tan pow cumprod cumsum dist norm prod
    std sum var renorm"""
FLOAT_F = """interpolate grid_sample softplus softmin log_softmax softmax gelu layer_norm group_norm
    local_response_norm normalize cosine_similarity poisson_nll_loss cosine_embedding_loss cross_entropy
    hinge_embedding_loss kl_div l1_loss mse_loss margin_ranking_loss multilabel_margin_loss
    multilabel_soft_margin_loss multi_margin_loss nll_loss binary_cross_entropy_with_logits smooth_l1_loss
    soft_margin_loss triplet_margin_loss ctc_loss"""
PROMOTE = "addcdiv addcmul atan2 cross bilinear dot add div mul eq equal ge gt le lt ne"
PROMOTE_OPERATORS = """__add__ __div__ __eq__ __ge__ __gt__ __iadd__ __idiv__ __imul__ __isub__ __itruediv__ __le__
    __lt__ __mul__ __ne__ __radd__ __rmul__ __rsub__ __sub__ __truediv__"""
DIVISIONS = "__rdiv__ __rtruediv__"
SEQUENCE = "cat stack"
NOTHING = "softmax sigmoid tanh mean relu cos sin sqrt abs clamp_min"

TABLE = {
    "half": {
        "torch": HALF.split(),
        "F": [*HALF_F.split(), "prelu"],  # torch's functional module has some functions of torch, for its layers
        "Tensor": names(HALF + " __matmul__"),
    },
    "float": {
        "torch": FLOAT.split(),
        "F": FLOAT_F.split(),
        "Tensor": names(FLOAT + " __ipow__ __pow__ __rpow__ cpu"),
    },
    "promote": {
        "torch": PROMOTE.split(),
        "F": ["bilinear"],
        "Tensor": names(f"{PROMOTE} {PROMOTE_OPERATORS}"),
    },
    "reciprocal": {"Tensor": names(DIVISIONS)},  # a promoting function whose Python calls a float function
    "sequence": {"torch": SEQUENCE.split()},
    "nothing": {"torch": NOTHING.split(), "Tensor": names(NOTHING), "F": ["relu", "dropout", "sigmoid", "tanh"]},
}
IN_PLACE = {
    "banned": {
        "torch": names(" ".join(f"{name}_" for name in FLOAT.split()), "torch"),
        "Tensor": names(" ".join(f"{name}_" for name in FLOAT.split())),
    },
    "self": {"Tensor": names(" ".join(f"{name}_" for name in (HALF + " " + PROMOTE).split()))},
}
"""name_ of float functions refuses half; name_ of the others casts to the type of self."""


class Index(NamedTuple):
    """An argument of integers."""

    values: tuple


BINARY = {"input": (2, 3), "other": (2, 3)}
LOSS = {"input": (2, 3), "target": (2, 3)}
UNARY = {"input": (2, 3)}
BATCH = {"batch1": (5, 2, 3), "batch2": (5, 3, 4)}
CLASSES = {"input": (2, 3), "target": Index((0, 2))}
CALLS = {
    "conv1d": {"input": (2, 3, 8), "weight": (4, 3, 3), "bias": (4,)},
    "conv2d": {"input": (1, 2, 5, 5), "weight": (3, 2, 3, 3)},
    "conv3d": {"input": (1, 2, 4, 4, 4), "weight": (2, 2, 2, 2, 2)},
    "conv_transpose1d": {"input": (1, 2, 5), "weight": (2, 3, 3)},
    "conv_transpose2d": {"input": (1, 2, 4, 4), "weight": (2, 3, 2, 2)},
    "conv_transpose3d": {"input": (1, 2, 3, 3, 3), "weight": (2, 3, 2, 2, 2)},
    "conv_tbc": {"input": (5, 2, 3), "weight": (3, 3, 4), "bias": (4,)},
    "prelu": {"input": (2, 3), "weight": (3,)},
    "addmm": {"input": (2, 4), "mat1": (2, 3), "mat2": (3, 4)},
    "addmv": {"input": (2,), "mat": (2, 3), "vec": (3,)},
    "addr": {"input": (2, 3), "vec1": (2,), "vec2": (3,)},
    "matmul": {"input": (2, 3), "other": (3, 4)},
    "mm": {"input": (2, 3), "mat2": (3, 4)},
    "mv": {"input": (2, 3), "vec": (3,)},
    "addbmm": {"input": (2, 4), **BATCH},
    "baddbmm": {"input": (5, 2, 4), **BATCH},
    "bmm": {"input": (5, 2, 3), "mat2": (5, 3, 4)},
    "linear": {"input": (2, 3), "weight": (4, 3), "bias": (4,)},
    "__matmul__": {"input": (2, 3), "other": (3, 4)},
    "pow": {"input": (2, 3), "exponent": (2, 3)},
    "cumprod": {**UNARY, "dim": 1},
    "cumsum": {**UNARY, "dim": 1},
    "dist": BINARY,
    "renorm": {**UNARY, "p": 2, "dim": 0, "maxnorm": 0.5},
    "interpolate": {"input": (1, 1, 4), "scale_factor": 2},
    "grid_sample": {"input": (1, 1, 3, 3), "grid": (1, 2, 2, 2), "align_corners": [False]},
    **{name: {**UNARY, "dim": 1} for name in ("softmin", "log_softmax", "softmax")},
    "layer_norm": {"input": (2, 4), "normalized_shape": [[4]], "weight": (4,), "bias": (4,)},
    "group_norm": {"input": (2, 4), "num_groups": 2, "weight": (4,), "bias": (4,)},
    "local_response_norm": {"input": (2, 4, 5), "size": 2},
    "cosine_similarity": {"x1": (2, 3), "x2": (2, 3)},
    **dict.fromkeys(("poisson_nll_loss", "hinge_embedding_loss", "l1_loss", "mse_loss", "smooth_l1_loss"), LOSS),
    **dict.fromkeys(("soft_margin_loss", "multilabel_soft_margin_loss", "binary_cross_entropy_with_logits"), LOSS),
    "cosine_embedding_loss": {"input1": (2, 3), "input2": (2, 3), "target": Index((1, -1))},
    **dict.fromkeys(("cross_entropy", "multi_margin_loss", "nll_loss"), CLASSES),
    "kl_div": {**LOSS, "reduction": ["batchmean"]},
    "margin_ranking_loss": {"input1": (3,), "input2": (3,), "target": (3,)},
    "multilabel_margin_loss": {"input": (2, 3), "target": Index(((0, 2, -1), (1, -1, 0)))},
    "triplet_margin_loss": {"anchor": (2, 3), "positive": (2, 3), "negative": (2, 3)},
    "ctc_loss": {
        "log_probs": (4, 1, 3),
        "targets": Index(((1, 2),)),
        "input_lengths": Index((4,)),
        "target_lengths": Index((2,)),
    },
    **dict.fromkeys(("atan2", "add", "div", "mul", "eq", "equal", "ge", "gt", "le", "lt", "ne"), BINARY),
    **{name: {"input": (2, 3), "tensor1": (2, 3), "tensor2": (2, 3)} for name in ("addcdiv", "addcmul")},
    "cross": {**BINARY, "dim": 1},
    "bilinear": {"input1": (2, 3), "input2": (2, 4), "weight": (5, 3, 4), "bias": (5,)},
    "dot": {"input": (3,), "tensor": (3,)},
    **dict.fromkeys((f"{PROMOTE_OPERATORS} {DIVISIONS} __pow__ __ipow__ __rpow__").split(), BINARY),
    "clamp_min": {**UNARY, "min": 0.5},
    "dropout": {**UNARY, "p": 0.0},
}
"""Name -> arguments in order. A tuple is a tensor of that shape, a list holds a plain value."""

BY_NAME = {"align_corners", "reduction", "scale_factor"}
"""Arguments that stand behind others in their function's signature."""


def call_of(name):
    return CALLS.get(name) or CALLS.get(name.removesuffix("_"), UNARY)


def arguments(name, device):
    """Return the arguments of a call of `name` in order: fp32 tensors that half holds exactly, and other values."""
    generator = torch.Generator().manual_seed(0)

    def make(spec):
        if isinstance(spec, Index):
            return torch.tensor(spec.values, device=device)
        if isinstance(spec, tuple):
            return (torch.randint(8, 56, spec, generator=generator) / 64).to(device)
        return spec[0] if isinstance(spec, list) else spec

    return {key: make(spec) for key, spec in call_of(name).items()}


def is_floating(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def with_dtypes(given, dtypes):
    """Return the arguments with their floating tensors in `dtypes`, of which the last goes on."""
    result, left = {}, list(dtypes)
    for key, value in given.items():
        if is_floating(value):
            dtype = left.pop(0) if len(left) > 1 else left[0]
            # The narrow dtypes hold a value that differs from fp32's, so that a wrong cast shows in numbers too.
            result[key] = (value * 1.0009765625 if dtype == torch.float32 else value).to(dtype, copy=True)
        else:
            result[key] = value
    return result
