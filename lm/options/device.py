"""Find the device that a command line asks for."""

import torch

from roundoff.device import ACCELERATORS
from roundoff.errors import UsageError


def find_device(name: str | None, *, cuda: bool = False, processes: int = 1) -> str:
    """Return the device that --device `name` and --cuda ask for, as torch spells it; "cpu" if neither is given.

    Each of several `processes` on this machine takes a GPU of its own.

    Raises:
        UsageError: the two contradict each other, torch does not know `name`, this machine has no such device, or
            CUDA does not start.
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
        kind = f"CUDA GPU here{_without_cuda()}" if device.type == "cuda" else f"{device.type} device here"
        raise UsageError(f"{asked}: torch finds no {kind}; to run on the CPU, leave the flag out")
    if (device.index or 0) >= present:
        raise UsageError(f"{asked}: this machine has {present}; the last one is {device.type}:{present - 1}")
    if device.type == "cuda" and processes > 1 and (device.index is not None or processes > present):
        raise UsageError(
            f"{asked} with {processes} processes on this machine, which has {present} GPUs: each process takes one of "
            f"its own; give --device cuda and at most {present} processes"
        )
    if device.type == "cuda":
        _start_cuda(asked)
    return name


def _without_cuda() -> str:
    """Say that it is torch that lacks CUDA, where it is; a ROCm build of torch calls its GPUs "cuda" too."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f", since torch {torch.__version__} is built without CUDA: for a GPU install a build with it"
    return ""


def _start_cuda(asked: str) -> None:
    """Raise UsageError where CUDA counts GPUs but does not start, as with a driver that is too old for torch."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:160]
        raise UsageError(f"{asked}: CUDA does not start ({reason}); to run on the CPU, leave the flag out") from None


def find_accelerator(name: str | None, *, cuda: bool = False, processes: int = 1) -> str:
    """Return the device that --accel asks for beside --device `name` and --cuda: the one that torch names.

    The rest is as for `find_device`.

    Raises:
        UsageError: there is none, it is of a kind that this project does not support, or another one was asked for.
    """
    found = torch.accelerator.current_accelerator()
    if found is None or not torch.accelerator.is_available():  # torch 2.6 names one that is not there
        raise UsageError("--accel: torch finds no accelerator here; to run on the CPU, leave the flag out")
    if found.type not in ACCELERATORS:
        raise UsageError(f"--accel: {found.type} is not supported ({', '.join(ACCELERATORS)} are); leave the flag out")
    if name is not None and name.partition(":")[0] != found.type:
        raise UsageError(f"--accel ({found.type}) and --device {name} contradict each other: give one of them")
    return find_device(name or found.type, cuda=cuda, processes=processes)  # which refuses --cuda beside another kind
