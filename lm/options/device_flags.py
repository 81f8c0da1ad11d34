"""The flags that name a device. Torch is imported only where one of them asks for another device than the CPU."""

import argparse

from roundoff.cli import Switch


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """Add --cuda, --accel and --device, which `device_of` takes."""
    parser.add_argument("--cuda", action=Switch, help="the same as --device cuda")
    parser.add_argument("--accel", action=Switch, help="run on this machine's accelerator: CUDA, XPU or MPS")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N, xpu or mps (default: cpu)")


def device_of(device: str | None, *, cuda: bool, accel: bool, processes: int = 1) -> str:
    """Return the device that --device, --cuda and --accel ask for; see `lm.options.device.find_device`.

    Raises:
        UsageError: there is no such device here, or the flags contradict each other.
    """
    if device in (None, "cpu") and not cuda and not accel:
        return "cpu"
    from lm.options.device import find_accelerator, find_device  # here, since torch takes seconds

    find = find_accelerator if accel else find_device
    return find(device, cuda=cuda, processes=processes)
