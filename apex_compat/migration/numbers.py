"""Says at which functions the casts of O1 and of torch.autocast differ, as far as training sees it."""

from __future__ import annotations

import ast

from apex_compat.migration.source import Source

_FLOAT_IN_APEX = "float32 under O1; autocast leaves it in the dtype of its input"
_FLOAT_IN_AUTOCAST = "O1 leaves it in the dtype of its input; float32 under autocast on CUDA"
_HALF_IN_AUTOCAST = "O1 leaves its inputs alone; half precision under autocast"
DIFFERENT = {
    **dict.fromkeys(
        ("gelu", "GELU", "interpolate", "local_response_norm", "LocalResponseNorm", "normalize", "std", "var"),
        _FLOAT_IN_APEX,
    ),
    **dict.fromkeys(("multilabel_soft_margin_loss", "softmin", "Softmin", "ctc_loss", "CTCLoss"), _FLOAT_IN_APEX),
    **dict.fromkeys(
        ("log1p", "logsumexp", "cdist", "pdist", "huber_loss", "HuberLoss", "rms_norm"), _FLOAT_IN_AUTOCAST
    ),
    **dict.fromkeys(("einsum", "chain_matmul", "multi_dot", "scaled_dot_product_attention"), _HALF_IN_AUTOCAST),
    **dict.fromkeys(("LSTM", "GRU"), "autocast casts it on CUDA alone; on the CPU LSTM in float16 raises"),
    "binary_cross_entropy": "both refuse half precision, autocast on CUDA float32 too: use ..._with_logits",
    "BCELoss": "both refuse half precision, autocast on CUDA float32 too: use BCEWithLogitsLoss",
}
"""Last part of a function's name -> the difference."""
METHODS = dict.fromkeys(("softmax", "log_softmax"), "as a method of a tensor: half under O1, float32 under autocast")


def differing_calls(source: Source) -> list[tuple[ast.AST, str]]:
    """Return the calls in the script whose numbers differ, with the reason."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name, owner = _split(node.func)
        if name in DIFFERENT:
            found.append((node, DIFFERENT[name]))
        elif name in METHODS and owner not in ("F", "nn.functional", "torch.nn.functional"):
            found.append((node, METHODS[name]))
    return found


def _split(function: ast.expr) -> tuple[str, str]:
    if isinstance(function, ast.Attribute):
        return function.attr, ast.unparse(function.value)
    return (function.id, "") if isinstance(function, ast.Name) else ("", "")
