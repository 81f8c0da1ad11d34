"""Which device a run uses, and what it is."""

import argparse
import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lm.errors import UsageError

ACCELERATORS = ("cuda", "xpu", "mps")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def find_device(name: str | None, *, cuda: bool = False, processes: int = 1) -> str:
    """The device that --device `name` and --cuda ask for, as torch spells it; "cpu" where neither is given.

    Each of several `processes` on this machine takes a GPU of its own.

    Raises:
        UsageError: the two contradict each other, torch does not know `name`, or this machine has no such device.
    """
    if cuda and name is not None and not name.startswith("cuda"):
        raise UsageError(f"--cuda and --device {name} contradict each other: give one of them")
    name = name or ("cuda" if cuda else "cpu")
    asked = f"--device {name}" if not cuda else "--cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is no device of torch; give cpu, cuda, cuda:N, xpu or mps") from None
    if device.type not in ("cpu", *ACCELERATORS):
        raise UsageError(f"--device {name} is not supported; give cpu, cuda, cuda:N, xpu or mps")
    present = 1 if device.type == "cpu" else torch.get_device_module(device.type).device_count()
    if present == 0:
        kind = "CUDA GPU" if device.type == "cuda" else f"{device.type} device"
        raise UsageError(f"{asked}: torch finds no {kind} here; to run on the CPU, leave the flag out")
    if (device.index or 0) >= present:
        raise UsageError(f"{asked}: this machine has {present}; the last one is {device.type}:{present - 1}")
    if device.type == "cuda" and processes > 1 and (device.index is not None or processes > present):
        raise UsageError(
            f"{asked} with {processes} processes on this machine, which has {present} GPUs: each process takes one of "
            f"its own; give --device cuda and at most {present} processes"
        )
    return name


def find_accelerator(name: str | None, *, cuda: bool = False, processes: int = 1) -> str:
    """The device that --accel asks for beside --device `name` and --cuda: the one that torch names.

    The rest is as for `find_device`.

    Raises:
        UsageError: there is none, it is of a kind that this project does not support, or another one was asked for.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        raise UsageError("--accel: torch finds no accelerator here; to run on the CPU, leave the flag out")
    if found.type not in ACCELERATORS:
        raise UsageError(f"--accel: {found.type} is not supported ({', '.join(ACCELERATORS)} are); leave the flag out")
    if name is not None and name.partition(":")[0] != found.type:
        raise UsageError(f"--accel ({found.type}) and --device {name} contradict each other: give one of them")
    return find_device(name or found.type, cuda=cuda, processes=processes)  # which refuses --cuda beside another kind


def device_of(args: argparse.Namespace, processes: int = 1) -> str:
    """The device that the options of `add_device_options` ask for; the rest is as for the functions above."""
    find = find_accelerator if args.accel else find_device
    return find(getattr(args, "device", None), cuda=args.cuda, processes=processes)


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
