"""The precision modes by name, as the command lines that ask the trainers for them."""

import argparse
from typing import Any

MODES: dict[str, list[str]] = {
    "fp32": ["main.py"],
    "manual": ["main.py", "--fp16"],
    "fp16-optimizer": ["main_fp16_optimizer.py", "--fp16"],
    "fp16-optimizer-dynamic": ["main_fp16_optimizer.py", "--fp16", "--dynamic-loss-scale"],
    "amp-fp16": ["main_amp.py"],
    "amp-bf16": ["main_amp.py", "--dtype", "bfloat16"],
    "amp-fp32": ["main_amp.py", "--dtype", "float32"],
    "fp16-optimizer-fp32": ["main_fp16_optimizer.py"],
}
DEFAULT_MODES = ("fp32", "manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")

_LABELS = {
    ("main", "fp32"): "fp32",
    ("main", "fp16"): "manual",
    ("main_fp16_optimizer", "fp16-static"): "fp16-optimizer",
    ("main_fp16_optimizer", "fp16-dynamic"): "fp16-optimizer-dynamic",
    ("main_fp16_optimizer", "fp32-static"): "fp16-optimizer-fp32",
    ("main_amp", "float16"): "amp-fp16",
    ("main_amp", "bfloat16"): "amp-bf16",
    ("main_amp", "float32"): "amp-fp32",
}


def label(config: dict[str, Any]) -> str:
    """The name of the mode that a run's `config.json` describes; script and mode where it has no name."""
    script, mode = str(config.get("script")), str(config.get("mode"))
    return _LABELS.get((script, mode), f"{script}-{mode}")


def mode_names(text: str) -> list[str]:
    """An argparse type: names of modes, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"{name!r} is no mode; there are {', '.join(MODES)}")
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name} is named twice")
    return names
