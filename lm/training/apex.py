"""NVIDIA's own fp16_utils, where an apex that still has it is installed."""

import importlib
from types import ModuleType

from roundoff.errors import UsageError


def import_fp16_utils(which: str) -> ModuleType:
    """Import and return this project's fp16_utils ("own"), or NVIDIA's ("apex") of an apex from before May 2025.

    Raises:
        UsageError: apex is not installed, or has no fp16_utils any more.
    """
    try:
        return importlib.import_module("apex.fp16_utils" if which == "apex" else "apex_compat.fp16_utils")
    except ImportError as error:
        raise UsageError(
            f"--fp16-utils apex: cannot import apex.fp16_utils ({error}); NVIDIA removed it in May 2025; "
            "install an older apex, or leave the flag out to use this project's"
        ) from None
