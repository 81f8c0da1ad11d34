"""What torch keeps for a whole process and a run sets: determinism, TF32, how sums of half products are rounded."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
HALF_SUMS = tuple((cuda.matmul, f"allow_{half}_reduced_precision_reduction") for half in ("fp16", "bf16"))
TF32: tuple[tuple[Any, str], ...] = ((cuda.matmul, "allow_tf32"), (cudnn, "allow_tf32"))
"""By torch's older names: set last, they agree with the newer ones; the other way round they can no longer be read."""
ATTRIBUTES = ((torch.utils.deterministic, "fill_uninitialized_memory"), *HALF_SUMS, *TF32)


def deterministic() -> tuple[bool, bool]:
    """Whether only deterministic algorithms are allowed, and whether others are but warned of."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def switches() -> list[Any]:
    """How all of them are set now."""
    with warnings.catch_warnings(action="ignore"):  # of the older names
        return [deterministic(), os.environ.get(CUBLAS), *(getattr(place, name) for place, name in ATTRIBUTES)]


@contextmanager
def switches_kept() -> Iterator[None]:
    """Set all of them after the block as they were before it."""
    (only, warn_only), workspace, *values = switches()
    try:
        yield
    finally:
        if deterministic() != (only, warn_only):  # the call imports torch's compiler, which takes seconds
            torch.use_deterministic_algorithms(only, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = workspace
        with warnings.catch_warnings(action="ignore"):
            for (place, name), value in zip(ATTRIBUTES, values, strict=True):
                setattr(place, name, value)
