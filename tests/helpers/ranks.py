"""Runs the trainers in several processes, forked or through torchrun; see `worker`."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from programs import ROOT, TINY, read_rows
from worker import PATIENCE

WORKER = Path(__file__).with_name("worker.py")


class Ended(NamedTuple):
    """What is left of a distributed run: of each rank, or, through torchrun, of all together."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Ranks:
    """Runs programs in several processes, in the folder `folder`."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._parent = subprocess.Popen(
            [sys.executable, str(WORKER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.folder = Path()

    def run(self, processes: int, script: str, *flags: str, **faults: Any) -> Ended:
        """As many processes of `script`, ended in any way."""
        request = {
            "processes": processes,
            "folder": str(self.folder),
            "faults": faults,
            "command": [script, *map(str, flags)],
        }
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        codes = json.loads(self._parent.stdout.readline())
        said = ([(self.folder / f"{name}-{n}").read_text() for n in range(processes)] for name in ("out", "err"))
        return Ended(codes, *said)

    def train(self, processes: int, script: str, *flags: str, name: str = "run", **faults: Any) -> list[dict[str, Any]]:
        """A tiny run into `name` and `name`.pt, which must succeed; return its steps."""
        where = ["--run-dir", name, "--save", f"{name}.pt"]
        ended = self.run(processes, script, *TINY, *flags, *where, **faults)
        assert ended.codes == [0] * processes, ended
        assert ended.err == [""] * processes, ended.err
        return read_rows(self.folder / name / "steps.jsonl")

    def close(self) -> None:
        """End the parent."""
        self._parent.stdin.close()
        try:
            self._parent.wait(PATIENCE)
        finally:
            self._parent.kill()
            self._parent.stdout.close()


def torchrun(folder: Path, script: str, *flags: str, processes: int = 2, **faults: Any) -> Ended:
    """`torchrun --nproc-per-node processes script.py flags`; with `faults`, through worker.py.

    On a port that is free, so that tests can run side by side.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [str(WORKER), json.dumps(faults), script] if faults else [str(ROOT / f"{script}.py")]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    command = [sys.executable, *start, *program, *flags]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=2 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # let it end its processes; each has an alarm, too
            raise
    return Ended([process.returncode], [out], [err])
