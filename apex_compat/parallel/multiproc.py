"""Starts a script once for each GPU.

python -m apex_compat.parallel.multiproc SCRIPT [ARGS...]
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script of `argv` in several processes, and wait for them.

    Each process gets `--world-size N --rank RANK` behind the arguments of `argv`. N is the number of GPUs, or
    that of a `--world-size N` in `argv`. Rank 0 prints to the terminal, rank i to the file GPU_i.log. When one
    fails, the others are ended.

    Args:
        argv: the command line's arguments by default.

    Returns:
        The exit code: 0, 2 for a mistake in `argv`, 1 if a process failed, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    size = str(torch.cuda.device_count())
    if "--world-size" in words[:-1]:
        at = words.index("--world-size")
        size = words[at + 1]
        del words[at : at + 2]
    if not words:
        print("error: SCRIPT is missing; give a Python file and its arguments", file=sys.stderr)
        return 2
    if not size.isdecimal() or int(size) == 0:
        print(
            f"error: the number of processes is {size!r}; it must be 1 at least: give --world-size N", file=sys.stderr
        )
        return 2
    with ExitStack() as stack:
        running = []
        for rank in range(int(size)):
            log = None if rank == 0 else stack.enter_context(Path(f"GPU_{rank}.log").open("w"))
            # Through the runner, so that the script's `import apex` works in a process of its own.
            command = [sys.executable, "-m", "apex_compat", *words, "--world-size", size, "--rank", str(rank)]
            running.append(subprocess.Popen(command, stdout=log))  # noqa: S603  the purpose of this program
        return _wait(running)


def _wait(running: list[subprocess.Popen[bytes]]) -> int:
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break
            time.sleep(0.1)
        return int(any(process.poll() for process in running))
    except KeyboardInterrupt:
        return 130
    finally:
        for process in running:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
