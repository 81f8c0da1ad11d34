"""Replaces what scripts import from NVIDIA's apex, on any device. It imports torch alone, and that when it is used."""

from __future__ import annotations

import importlib

from apex_compat.provide import PACKAGES, provide_apex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apex_compat.checkpoint import load_apex_checkpoint

__all__ = ["load_apex_checkpoint", "provide_apex"]


def __getattr__(name: str) -> Any:
    # A process of an environment where `enable` was run imports this package at its start, needed or not.
    if name == "load_apex_checkpoint":
        return importlib.import_module("apex_compat.checkpoint").load_apex_checkpoint
    if name in PACKAGES:  # `import apex_compat` then gives apex_compat.amp, as `import apex` gave apex.amp
        return importlib.import_module(f"apex_compat.{name}")
    raise AttributeError(f"module 'apex_compat' has no attribute {name!r}")
