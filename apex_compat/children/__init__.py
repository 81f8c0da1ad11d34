"""Gives apex, and CUDA on the CPU, to the processes that a script of `python -m apex_compat` starts.

The runner puts this folder on PYTHONPATH. Each Python process then runs `sitecustomize` at its start, whoever starts
it: multiprocessing, subprocess, torchrun.
"""

from __future__ import annotations

import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  pathlib takes milliseconds to import
PREFIX, DEVICE = "APEX_COMPAT_PREFIX", "APEX_COMPAT_DEVICE"
"""Environment variables: the environment whose processes are meant, and "cpu" for `--device cpu`."""


def child_environment(device: str | None) -> dict[str, str]:
    """Return the environment variables for the processes of a script that runs with `--device device`."""
    paths = [FOLDER, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))), PREFIX: sys.prefix, DEVICE: device or ""}
