"""The precision modes: each one's name, trainer, options and dtype, and the modes that it must equal, once."""

import argparse
from dataclasses import dataclass
from typing import Any

from lm.options.options import Options
from roundoff.cli import nearest

FP32 = ("fp32", "fp16-optimizer-fp32", "amp-fp32")
FP16_STATIC = ("manual", "fp16-optimizer")
FP16_DYNAMIC = ("fp16-optimizer-dynamic", "apex-o2")


@dataclass(frozen=True)
class Mode:
    """A way to manage precision.

    Attributes:
        name: in `compare.py --modes`, in config.json and in reports.
        script: the trainer, such as "main_amp".
        options: of the trainer, that make it train in this mode.
        dtype: of the products.
        equals: modes whose training losses must be the same to the bit, on one machine and where loss scales are
            powers of two; this mode among them. In fp16 the loss scales must be equal besides.
    """

    name: str
    script: str
    options: dict[str, Any]
    dtype: str
    equals: tuple[str, ...] = ()


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("fp32", "main", {}, "float32", FP32),
        Mode("manual", "main", {"fp16": True}, "float16", FP16_STATIC),
        Mode("fp16-optimizer", "main_fp16_optimizer", {"fp16": True}, "float16", FP16_STATIC),
        Mode(
            "fp16-optimizer-dynamic",
            "main_fp16_optimizer",
            {"fp16": True, "dynamic_loss_scale": True},
            "float16",
            FP16_DYNAMIC,
        ),
        Mode("amp-fp16", "main_amp", {}, "float16"),
        Mode("amp-bf16", "main_amp", {"dtype": "bfloat16"}, "bfloat16"),
        Mode("amp-fp32", "main_amp", {"dtype": "float32"}, "float32", FP32),
        Mode("apex-o1", "main_amp", {"opt_level": "O1"}, "float16"),
        Mode("apex-o2", "main_amp", {"opt_level": "O2"}, "float16", FP16_DYNAMIC),
        Mode("fp16-optimizer-fp32", "main_fp16_optimizer", {}, "float32", FP32),
    )
}
DEFAULT_MODES = ("fp32", "manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")

SHORT = {"fp16": "amp-fp16", "bf16": "amp-bf16"}
"""What half dtypes mean where a mode is named: autocast, as everywhere else."""
PROBED = ("fp32", "manual", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")
"""What a probe measures by default: fp16-optimizer at its static scale has the gradient of manual in every bit."""


def mode_of(options: Options) -> Mode:
    """Return the mode in which a run with these options trains; one that is not in `MODES` is called by its script."""
    asked = options.script, options.dtype, options.dynamic_loss_scale, options.opt_level
    for mode in MODES.values():
        given = mode.options.get("dynamic_loss_scale", False), mode.options.get("opt_level")
        if (mode.script, mode.dtype, *given) == asked:
            return mode
    if options.opt_level is not None:
        return Mode(f"apex-{options.opt_level.lower()}-{options.dtype}", options.script, {}, options.dtype)
    return Mode(f"{options.script}-{options.dtype}-dynamic", options.script, {}, options.dtype)


def mode_name(text: str) -> str:
    """Return the name of a mode, of which `text` may be the short form."""
    return SHORT.get(text, text)


def mode_names(text: str) -> list[str]:
    """Read names of modes, separated by commas; an argparse type."""
    names = [mode_name(name) for name in text.split(",")]
    for name in names:
        if name not in MODES:
            near = nearest(name, [*MODES, *SHORT]) if name else None
            hint = f"did you mean {near}? " if near else ""
            raise argparse.ArgumentTypeError(f"{name!r} is no mode; {hint}there are {', '.join(MODES)}")
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
    return names
