"""The environment of a run, as `config.json` holds it."""

import platform
import sys
from typing import Any

import torch

import roundoff
from roundoff.device import device_name


def environment() -> dict[str, Any]:
    """Return the versions of torch, Python and this library, the system, the command and the device.

    The device is the CUDA GPU where there is one, else the CPU.
    """
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "roundoff": roundoff.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
    }
