"""Reads files in a process that may take so many MiB of memory beyond what Python and torch take.

As a program: bounded.py MIB PATH...; a directory is read as a run, a file as a tensor file.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roundoff.errors import BadFileError, UsageError
from roundoff.runs.reading import read_run
from roundoff.runs.tensor_file import load_tensors

FORMAT = "test 1"
"""The format of the tensor files."""

needs_bounds = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can bound a process's memory")


def read_bounded(mib: int, *paths: Path) -> list[str]:
    """What came of each of `paths`, "read", "refused" or "no memory"; the first one is a good tensor file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(mib), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def main() -> None:
    """Print what came of each path."""
    torch.set_num_threads(1)
    mib, *paths = sys.argv[1:]
    load_tensors(Path(paths[0]), FORMAT)  # so that what torch takes once is taken
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(mib) * 2**20,) * 2)
    for path in map(Path, paths):
        try:
            read_run(path) if path.is_dir() else load_tensors(path, FORMAT)
        except (BadFileError, UsageError):
            print("refused")
        except MemoryError:
            print("no memory")
        else:
            print("read")


if __name__ == "__main__":
    main()
