"""The environment of a run, as `config.json` holds it."""

import platform
import sys
from typing import Any

import torch

import roundoff
from roundoff.device import device_name


def versions() -> dict[str, Any]:
    """Return the versions of torch, Python and this library, the system, and the number of threads."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "roundoff": roundoff.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def environment() -> dict[str, Any]:
    """Return the versions, the command and the device, which is the CUDA GPU where there is one, else the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return versions() | {"command": sys.argv, "device": device_name(device)}
