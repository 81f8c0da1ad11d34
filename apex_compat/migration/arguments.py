"""Says what the arguments of initialize and scale_loss are, and what GradScaler takes of them."""

from __future__ import annotations

import ast

SIGNATURES = {
    "apex.amp.initialize": (
        *("models", "optimizers", "enabled", "opt_level", "cast_model_type", "patch_torch_functions"),
        *("keep_batchnorm_fp32", "master_weights", "loss_scale", "cast_model_outputs", "num_losses", "verbosity"),
        *("min_loss_scale", "max_loss_scale"),
    ),
    "apex.amp.scale_loss": ("loss", "optimizers", "loss_id", "model", "delay_unscale", "delay_overflow_check"),
}
"""Function -> the names of its arguments, in the order of their positions."""
UNLIKE_AUTOCAST = ("cast_model_type", "patch_torch_functions", "cast_model_outputs")


def bind(name: str, call: ast.Call) -> dict[str, ast.expr]:
    """Return name -> argument of a call; those behind `*` or in `**` are not among them."""
    positional: dict[str, ast.expr] = {}
    for argument, value in zip(SIGNATURES.get(name, ()), call.args, strict=False):
        if isinstance(value, ast.Starred):
            break
        positional[argument] = value
    return positional | {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def is_written_out(call: ast.Call) -> bool:
    """Return True if a call has neither `*` nor `**`."""
    return all(keyword.arg for keyword in call.keywords) and not any(isinstance(a, ast.Starred) for a in call.args)


def level_of(call: ast.Call) -> str | None:
    """Return the literal opt_level of a call of initialize, O1 by default, None if it is an expression."""
    node = bind("apex.amp.initialize", call).get("opt_level")
    if node is None:
        return "O1" if is_written_out(call) else None
    return str(node.value) if isinstance(node, ast.Constant) else None


def obstacle_of_arguments(call: ast.Call) -> str:
    """Return what GradScaler and autocast cannot take over of a call of initialize, or an empty text."""
    given = bind("apex.amp.initialize", call)
    level, scale = level_of(call), given.get("loss_scale")
    if not is_written_out(call):
        return "the arguments of amp.initialize are not written out"
    if level not in ("O1", None):
        return f"opt_level is {level}"
    for name in UNLIKE_AUTOCAST:
        if not is_none(given.get(name)):
            return f"{name} is given"
    if isinstance(scale, ast.Constant) and not _is_scale(scale.value):
        return f"loss_scale is {scale.value!r}"
    if scale is not None and any(isinstance(node, ast.Call) for node in ast.walk(scale)):
        return "loss_scale is computed in the call of amp.initialize; give it a name before"
    return ""


def scaler_options(call: ast.Call) -> list[str]:
    """Return the arguments of GradScaler that mean those of a call of initialize."""
    given = bind("apex.amp.initialize", call)
    enabled = given.get("enabled")
    options = [f"enabled={ast.unparse(enabled)}"] if enabled else []
    if level_of(call) is None:
        has_scale = f'{_text(given["opt_level"])} != "O0"'
        options = [f"enabled={_text(enabled)} and {has_scale}" if enabled else f"enabled={has_scale}"]
    scale = given.get("loss_scale")
    if isinstance(scale, ast.Constant):
        options += [f"init_scale={float(scale.value)!r}"] if scale.value not in (None, "dynamic") else []  # type: ignore[arg-type]
    elif scale is not None:
        text = _text(scale)
        options.append(f'init_scale=2.0**16 if {text} in (None, "dynamic") else float({text})')
    return options


def is_none(node: ast.expr | None) -> bool:
    """Return True if an argument is not given, or is None."""
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _is_scale(value: object) -> bool:
    try:
        return value in (None, "dynamic") or float(value) > 0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _text(node: ast.expr) -> str:
    """Return an expression as it can stand beside `and`, `!=` or `in`."""
    text = ast.unparse(node)
    whole = isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.Constant))
    return text if whole else f"({text})"
