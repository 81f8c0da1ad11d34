"""One process of a distributed run, with faults injected: under torchrun, or forked by a parent that imported torch.

    torchrun ... rank.py FAULTS SCRIPT FLAGS...     as one process that torchrun starts
    rank.py                                         as the parent: JSON requests on stdin, answers on stdout

Starting a process costs the seconds of `import torch`; forking one costs none. FAULTS is a JSON object, from a
function of this file to its arguments.
"""

import faulthandler
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from lm.launch.entry import run_trainer
from lm.training import distributed
from lm.training.loop import Training
from roundoff import processes

PATIENCE = 60.0
"""Seconds after which a run of these tests has hung."""
GRACE = 8.0
"""Seconds between SIGTERM and SIGKILL for the other processes when one has failed, where torchrun waits for 30."""


def main(faults: str, script: str, *flags: str) -> int:
    """Run `script` with `flags` and `faults`."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # nothing stays behind, whatever happens
    for name, arguments in json.loads(faults).items():
        globals()[name](**arguments)
    sys.argv = [f"{script}.py", *flags]
    try:
        module = importlib.import_module(script)
        return run_trainer(module.main, module.__file__, module.__doc__)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def before(name: str, act: Callable[..., object]) -> None:
    """Call `act`, with the number of the call and the arguments, before `Training.name`."""
    original = getattr(Training, name)
    calls = 0

    def acting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls, *args)
        return original(*args)

    setattr(Training, name, acting)


def spoil(steps: dict[str, list[int]], parameter: str) -> None:
    """Let a rank, alone, have an inf in the gradient of `parameter` at its steps."""
    count = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count not in steps.get(str(processes.rank()), []):
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[-1] = torch.inf
        return gradient

    before("run", lambda _, training: dict(training.model.named_parameters())[parameter].register_hook(hook))


def dump(name: str) -> None:
    """After each step write what this rank has to the file `name`-<rank>: its step's result, weights, generator."""
    step = Training.train_step

    def dumping(training: Training, i: int) -> None:
        step(training, i)
        assert training.records._pending
        loss, norm, scale, applied = training.records._values[len(training.records._pending) - 1]
        row = {
            "loss": loss.item(),
            "grad_norm": norm.item().hex(),
            "loss_scale": scale.item(),
            "applied": bool(applied),
            "weights": _digest(*training.model.state_dict().values()),
            "masters": _digest(*[p for group in training.precision.param_groups for p in group["params"]]),
            "random": _digest(torch.get_rng_state()),
        }
        with Path(f"{name}-{processes.rank()}").open("a") as file:
            file.write(json.dumps(row) + "\n")

    Training.train_step = dumping  # type: ignore[method-assign]


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fail(rank: int, name: str, call: int, error: str) -> None:
    """Let `rank` raise an error of its own as `Training.name` is called for that time."""
    errors = {
        "disk": OSError(28, "No space left on device", "steps.jsonl"),
        "runtime": RuntimeError("a kernel failed"),
        "memory": RuntimeError("not enough memory: you tried to allocate 1 TB"),
    }

    def act(calls: int, *_: Any) -> None:
        if processes.rank() == rank and calls == call:
            raise errors[error]

    before(name, act)


def kill(rank: int, name: str, call: int, number: int = signal.SIGKILL) -> None:
    """Let `rank` send itself a signal as `Training.name` is called for that time."""

    def act(calls: int, *_: Any) -> None:
        if processes.rank() == rank and calls == call:
            os.kill(os.getpid(), number)

    before(name, act)


def leave_alone(name: str, call: int) -> None:
    """Let rank 0 fail while it waits for a message from rank 1, which goes on only when rank 0 has gone."""

    def act(calls: int, training: Training, *_: Any) -> None:
        if calls != call:
            return
        if processes.rank() == 0:
            distributed._store.set("pid", str(os.getpid()))
            dist.broadcast(torch.zeros(1), 1, async_op=True)
            raise RuntimeError("a kernel failed")
        with suppress(ProcessLookupError):
            while True:
                os.kill(int(distributed._store.get("pid")), 0)
                time.sleep(0.01)
        os._exit(0)

    before(name, act)


def signal_torchrun(name: str, call: int, number: int) -> None:
    """Send torchrun a signal as `Training.name` is called for that time, and go on once it is here."""

    def act(calls: int, training: Training, *_: Any) -> None:
        if calls == call:
            if processes.rank() == 0:
                os.kill(os.getppid(), number)
            deadline = time.monotonic() + PATIENCE
            while not training.stop._asked and time.monotonic() < deadline:
                time.sleep(0.01)

    before(name, act)


def patience(timeout: float = 60.0, roll_call: float = 0.3) -> None:
    """How many seconds processes wait for each other."""
    distributed.TIMEOUT = timedelta(seconds=timeout)
    distributed.ROLL_CALL = roll_call


def gpus(count: int) -> None:
    """Let this machine seem to have as many GPUs."""
    torch.cuda.device_count = lambda: count  # type: ignore[assignment]


def serve() -> None:
    """Answer requests until stdin ends."""
    importlib.import_module("torch._dynamo")  # by DistributedDataParallel, which takes seconds
    for script in ("main", "main_fp16_optimizer", "main_amp"):
        importlib.import_module(script)
    for line in sys.stdin:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, json.dumps(_Agent(**json.loads(line)).run()).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer, flush=True)


class _Agent:
    """Does what torchrun does: starts the processes, keeps the store, and ends all of them when one has failed."""

    def __init__(self, processes: int, folder: str, faults: dict[str, Any], command: list[str]) -> None:
        signal.alarm(int(PATIENCE + 2 * GRACE))
        self.folder = Path(folder)
        ports = [os.pipe() for _ in range(processes)]  # forked before the store's threads are there
        self.running = {
            self._fork(rank, processes, ports[rank][0], json.dumps(faults), command): rank for rank in range(processes)
        }
        self.codes = [0] * processes
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _, write in ports:
            os.write(write, str(self.store.port).encode())

    def _fork(self, rank: int, processes: int, port: int, faults: str, command: list[str]) -> int:
        names = ((1, self.folder / f"out-{rank}"), (2, self.folder / f"err-{rank}"))
        files = {number: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for number, path in names}
        if child := os.fork():
            return child
        code = 70
        try:
            for number, file in files.items():
                os.dup2(file, number)
            os.chdir(self.folder)
            if processes > 1:
                os.environ |= {
                    "TORCHELASTIC_RUN_ID": "none",
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": os.read(port, 16).decode(),
                }
            code = main(faults, *command)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self) -> list[int]:
        """The exit codes, in the order of ranks; that of a signal is negative."""
        deadline = time.monotonic() + PATIENCE + GRACE
        failed = False
        stopped = set()
        while self.running:
            child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if child and os.WIFSTOPPED(status):
                stopped.add(child)
            elif child:
                code = os.waitstatus_to_exitcode(status)
                self.codes[self.running.pop(child)] = code
                if code and not failed:
                    failed = True
                    self._signal(signal.SIGTERM)
                    deadline = time.monotonic() + GRACE
            elif time.monotonic() > deadline or self.running.keys() <= stopped:
                self._signal(signal.SIGKILL)
            else:
                time.sleep(0.005)
        return self.codes

    def _signal(self, number: int) -> None:
        for child in self.running:
            os.kill(child, number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        sys.exit(main(*sys.argv[1:]))
    serve()
