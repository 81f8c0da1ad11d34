"""The device of a run: its name, its versions, its random state, TF32, memory."""

import ctypes
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ACCELERATORS = ("cuda", "xpu", "mps")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def get_random_state(device: torch.device) -> torch.Tensor | None:
    """Return the state of the accelerator's generator as uint8 on the CPU; None where `device` is no accelerator."""
    if device.type not in ACCELERATORS:
        return None
    module = torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Put back what `get_random_state` returned."""
    module = torch.get_device_module(device)
    module.set_rng_state(*([state] if device.type == "mps" else [state, device]))


def get_random_states(device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the states of the generators of the CPU and of `device`."""
    return torch.get_rng_state(), get_random_state(torch.device(device))


def set_random_states(states: tuple[torch.Tensor, torch.Tensor | None], device: str) -> None:
    """Put back what `get_random_states` returned."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        set_random_state(states[1], torch.device(device))


@contextmanager
def random_state_kept(device: str) -> Iterator[None]:
    """Put the generators of the CPU and of `device` back after the block as they were before it."""
    accelerator = torch.device(device)
    with torch.random.fork_rng([]):  # of the CPU; it asks a device in a way that MPS does not know
        state = get_random_state(accelerator)
        try:
            yield
        finally:
            if state is not None:
                set_random_state(state, accelerator)


def set_tf32(allowed: bool) -> None:
    """Let CUDA products and cuDNN layers round fp32 operands to TF32, or forbid it (cuDNN allows it by default).

    By torch's older names: after the newer ones, torch.compile and others that still read the older get an error.
    """
    cudnn: Any = torch.backends.cudnn
    with warnings.catch_warnings(action="ignore"):  # torch 2.9 warns of the older names
        torch.backends.cuda.matmul.allow_tf32 = allowed
        cudnn.allow_tf32 = allowed
    if not allowed and hasattr(cudnn, "conv"):  # from torch 2.9 on; else these inherit what is set for all of torch
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"


def tf32_allowed() -> bool:
    """Return whether CUDA products or cuDNN layers may round fp32 operands to TF32, as torch is set now."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9: the older names fail after these were set
        cudnn: Any = torch.backends.cudnn
        places = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        return any(place.fp32_precision == "tf32" for place in places)
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


def forbid_reduced_precision_reductions() -> None:
    """Have cuBLAS add the parts of a half product up in fp32. By default it may do so in half.

    It splits a product with a long sum and a small result, such as the gradient of a decoder's input, into parts.
    fp16 sums of these would round once more, and overflow at 65,504 what is still multiplied by the loss scale.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def reduced_precision_reductions_allowed() -> bool:
    """Return whether cuBLAS may add the parts of a half product up in half, as torch is set now."""
    matmul = torch.backends.cuda.matmul
    return bool(matmul.allow_fp16_reduced_precision_reduction or matmul.allow_bf16_reduced_precision_reduction)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation, and not return it to the system.

    By default glibc returns a large block at once, and the system clears every page of the next one. For the fp32
    logits of a batch, 93 MB at WikiText-2's vocabulary, that takes ten times as long as writing them.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Return freed memory to the system now, where the C library is glibc."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def _glibc(name: str) -> Any:
    """Return the function `name` of the C library, or None where it has none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def device_name(device: str) -> str:
    """Return the processor's own name, such as "NVIDIA H100 80GB HBM3"; for xpu and mps that of the CPU beside it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return f"{names[0].partition(':')[2].strip()} x {len(names)}"
    return platform.processor() or platform.machine()


def cudnn_version() -> str | None:
    """Return cuDNN's version as torch numbers it, such as "91002" for 9.10.2; None where this torch has no cuDNN."""
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if version is None else str(version)


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Return the version of NVIDIA's driver, such as "550.54.14"; None where `file` does not say it."""
    try:
        line = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return None
    found = re.search(r"(?<![\w.])\d+(\.\d+)+", line)
    return found and found[0]


def peak_memory_bytes(device: str) -> int:
    """Return the most memory that this process has held: allocated by torch with CUDA, else resident.

    0 stands for "not known": Windows has neither /proc nor `resource`.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too, if that was more, since fork comes before exec
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0]) * 1024
    try:
        import resource  # here, since Windows has none
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
