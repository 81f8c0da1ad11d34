"""The message of a run that has diverged."""

from typing import Any

from lm.model.language_model import RNNModel
from lm.options.modes import mode_of
from lm.options.options import Options


def diverged(args: Options, model: RNNModel, row: dict[str, Any]) -> str:
    """Return the message of a run whose last step was `row`; `model` must still have the gradients of that step."""
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    advice = "a smaller --lr"
    if args.dtype == "float16":
        if args.loss_scale is not None:
            dynamic = "--dynamic-loss-scale" if args.script == "main_fp16_optimizer" else "main_amp.py's dynamic one"
            advice += f", a smaller --static-loss-scale, {dynamic}"
        advice += ", or main_amp.py --dtype bfloat16"
    return (
        f"{args.script}.py in mode {mode_of(args).name} has diverged: the loss or a gradient was not finite in "
        f"{args.max_skipped} steps in a row, up to step {row['step']}, at loss scale {row['loss_scale']:g}; "
        f"first parameter with a non-finite gradient: {bad[0] if bad else 'none'}; try {advice}"
    )
