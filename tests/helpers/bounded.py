"""Reads files in a process that may take so many MiB of memory beyond what Python and torch take.

As a program: bounded.py MIB PATH...; a directory is read as a run.
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
from roundoff.runs.tensorfile import load_tensors

needs_bounds = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can bound a process's memory")


def read_bounded(mib: int, *paths: Path) -> list[str]:
    """What came of each of `paths`, "read" or "refused"; the first one is a good tensor file."""
    tests = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, __file__, str(mib), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def main() -> None:
    """Print a word for each path; a MemoryError ends it."""
    torch.set_num_threads(1)
    mib, *paths = sys.argv[1:]
    load_tensors(Path(paths[0]))  # so that what torch takes once is taken
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(mib) * 2**20,) * 2)
    for path in map(Path, paths):
        try:
            read_run(path) if path.is_dir() else load_tensors(path)
        except (BadFileError, UsageError):
            print("refused")
        else:
            print("read")


if __name__ == "__main__":
    main()
