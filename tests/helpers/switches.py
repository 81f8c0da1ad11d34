"""What torch keeps for a whole process and a run sets: determinism, TF32, how sums of half products are rounded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
HALF_SUMS = tuple((cuda.matmul, f"allow_{half}_reduced_precision_reduction") for half in ("fp16", "bf16"))
TF32: tuple[tuple[Any, str], ...] = ((cuda.matmul, "allow_tf32"), (cudnn, "allow_tf32"))
if hasattr(cuda.matmul, "fp32_precision"):  # since torch 2.9, where those two may not even be read
    TF32 = tuple((place, "fp32_precision") for place in (cuda.matmul, cudnn.conv, cudnn.rnn))
ATTRIBUTES = ((torch.utils.deterministic, "fill_uninitialized_memory"), *HALF_SUMS, *TF32)


def switches() -> list[Any]:
    """How all of them are set now."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return [deterministic, os.environ.get(CUBLAS), *(getattr(place, name) for place, name in ATTRIBUTES)]


@contextmanager
def switches_kept() -> Iterator[None]:
    """Set all of them after the block as they were before it."""
    deterministic, workspace, *values = switches()
    try:
        yield
    finally:
        if switches()[0] != deterministic:  # the call imports torch's compiler, which takes seconds
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = workspace
        for (place, name), value in zip(ATTRIBUTES, values, strict=True):
            setattr(place, name, value)
