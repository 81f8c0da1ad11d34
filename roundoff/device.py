"""Which device a run uses, and what it is."""

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ACCELERATORS = ("cuda", "xpu", "mps")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def get_random_state(device: torch.device) -> torch.Tensor | None:
    """The state of the accelerator's generator, uint8 on the CPU; None where `device` is none."""
    if device.type not in ACCELERATORS:
        return None
    module = torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Put back what `get_random_state` returned."""
    module = torch.get_device_module(device)
    module.set_rng_state(*([state] if device.type == "mps" else [state, device]))


@contextmanager
def random_state_kept(device: str) -> Iterator[None]:
    """Let the generators of the CPU and of `device` be afterwards as they were before, whatever the block draws."""
    accelerator = torch.device(device)
    with torch.random.fork_rng([]):  # of the CPU; it asks a device in a way that MPS does not know
        state = get_random_state(accelerator)
        try:
            yield
        finally:
            if state is not None:
                set_random_state(state, accelerator)


def set_tf32(allowed: bool) -> None:
    """Let CUDA products and cuDNN layers round fp32 operands to TF32, or forbid it (cuDNN allows it by default)."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        precision = "tf32" if allowed else "ieee"
        torch.backends.cuda.matmul.fp32_precision = precision
        torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]
    else:  # torch before 2.9
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep freed memory for the next allocation instead of giving it back to the system.

    It returns large blocks at once, and the system clears every page of the next one: 25 ms for the 93 MB of a batch's
    fp32 logits at WikiText-2's vocabulary, 48 on a busy machine, where writing to memory that is there takes 2 to 3.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system now, where the C library is glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim:
        malloc_trim(0)


def device_name(device: str) -> str:
    """The processor's own name, such as "NVIDIA H100 80GB HBM3"; of xpu and mps that of the CPU beside it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return f"{names[0].partition(':')[2].strip()} x {len(names)}"
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: str) -> int:
    """The most memory that this process has held: allocated by torch with CUDA, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory too, if that was more, since fork comes before exec
        peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if peaks:
            return int(peaks[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
