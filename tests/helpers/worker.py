"""Processes of the trainers with faults, forked by a parent that has imported torch, which takes seconds.

    torchrun ... worker.py FAULTS SCRIPT FLAGS...   as one process that torchrun starts
    worker.py                                       as the parent: JSON requests on stdin, answers on stdout

FAULTS is a JSON object, from a function of this file to its arguments. Where there is a choice, `rank` says who.
"""

import errno
import faulthandler
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed as dist

import moments
from lm.launch.entry import run_trainer
from lm.training import distributed
from roundoff import processes

PATIENCE = 60.0
"""Seconds after which a run of these tests has hung."""
GRACE = 8.0
"""Seconds between SIGTERM and SIGKILL for the other processes when one has failed, where torchrun waits for 30."""
SCRIPTS = ("main", "main_fp16_optimizer", "main_amp")


def main(faults: str, script: str, *flags: str) -> int:
    """Run `script` with `flags` and `faults`."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # nothing stays behind, whatever happens
    sys.argv = [f"{script}.py", *flags]
    try:
        for name, arguments in json.loads(faults).items():
            globals()[name](**arguments)
        module = importlib.import_module(script)
        return run_trainer(module.main, module.__file__, module.__doc__)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def at(moment: str, n: int, do: str, rank: int = 0) -> None:
    """Let `rank` do one of `ACTS` the `n`-th time that `moment` comes; see `moments`."""
    if processes.rank() == rank:
        _when(moment, n, ACTS[do])


def _when(moment: str, n: int, act: Callable[[moments.Disk], object]) -> None:
    left = n

    def come(now: str) -> None:
        nonlocal left
        left -= now == moment
        if now == moment and left == 0:
            act(disk)

    disk = moments.Disk(come)
    moments.watch_batches(come)


def _send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def _leave_child() -> None:
    child = subprocess.Popen(["sleep", "60"], close_fds=False)  # noqa: S607
    Path("child").write_text(str(child.pid))
    _send(signal.SIGKILL)


def _fail(message: str) -> None:
    raise RuntimeError(message)


ACTS: dict[str, Callable[[moments.Disk], object]] = {
    "kill -9": lambda _: _send(signal.SIGKILL),
    "kill -9 but a child": lambda _: _leave_child(),
    "hang": lambda _: _send(signal.SIGSTOP),
    "SIGTERM": lambda _: _send(signal.SIGTERM),
    "Ctrl-C": lambda _: _send(signal.SIGINT),
    "Ctrl-C twice": lambda _: _send(signal.SIGINT, 2),
    "full disk": lambda disk: setattr(disk, "full", True),
    "read-only disk": lambda disk: setattr(disk, "read_only", True),
    "refused call": lambda disk: setattr(disk, "refuses", True),
    "mistake": lambda _: _fail("a kernel failed"),
    "out of memory": lambda _: _fail("not enough memory: you tried to allocate 1 TB"),
}


def note(name: str) -> None:
    """Write each moment, as it comes, as a line to the file `name`."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def come(moment: str) -> None:
        os.write(file, f"{moment}\n".encode())

    moments.Disk(come)
    moments.watch_batches(come)


def spoil(steps: dict[str, list[int]], parameter: str) -> None:
    """Let a rank, alone, have an inf in the gradient of `parameter` at its steps."""
    mine, count = steps.get(str(processes.rank()), []), 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count in mine:
            gradient = gradient.clone()
            gradient.view(-1)[-1] = torch.inf
        return gradient

    watched: list[Any] = []

    def seen(model: Any) -> None:
        if not watched:
            watched.append(dict(model.named_parameters())[parameter].register_hook(hook))

    moments.watch_batches(lambda _: None, seen)


def dump(name: str) -> None:
    """After each step write what this rank has to the file `name`-<rank>: its loss, result, weights, generator."""
    losses: list[torch.Tensor] = []

    def row(step: int, model: Any, precision: Any, result: Any) -> None:
        weights, masters = moments.tensors_of(model, precision)
        content = {
            "loss": losses[-1].item(),
            "grad_norm": float(result.grad_norm).hex(),
            "loss_scale": float(result.loss_scale),
            "applied": bool(result.applied),
            "weights": _digest(*weights),
            "masters": _digest(*masters),
            "random": _digest(torch.get_rng_state()),
        }
        with Path(f"{name}-{processes.rank()}").open("a") as file:
            file.write(json.dumps(content) + "\n")

    moments.watch_batches(lambda _: None, loss=losses.append)
    for script in SCRIPTS:
        vars(importlib.import_module(script))["fit"] = moments.after_steps(script, row)


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def average(gradients: str, means: str) -> None:
    """Average gradients as the trainers do, instead of training: row r of the tensor in a file is that of rank r.

    Each rank writes what it got in two passes to the file `means`-<rank>.
    """
    distributed.init_process_group("cpu")
    mine = torch.load(gradients)[processes.rank()]
    weights = torch.nn.ParameterList(torch.zeros_like(part) for part in mine.tensor_split([7, 1000]))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = weights

        def forward(self) -> torch.Tensor:
            parts = mine.tensor_split([7, 1000])
            return torch.stack([(w.float() * g.float()).sum() for w, g in zip(self.weights, parts, strict=True)]).sum()

    parallel, passes = distributed.data_parallel(Model()), []
    for _ in range(2):
        parallel.zero_grad()
        parallel().backward()
        passes.append(torch.cat([weight.grad for weight in weights]).clone())
    torch.save(passes, f"{means}-{processes.rank()}")
    raise SystemExit(0)


def apex_parallel() -> None:
    """Run the cases of apex_compat.parallel instead of training, into the working folder."""
    importlib.import_module("parallel_cases").run(Path())
    raise SystemExit(0)


def leave_alone(moment: str, n: int) -> None:
    """Let rank 0 fail while it waits for a message from rank 1, which goes on only when rank 0 has gone."""

    def act(_: object) -> None:
        pid = Path("pid-0")
        if processes.rank() == 0:
            pid.with_name("pid").write_text(str(os.getpid()))
            pid.with_name("pid").rename(pid)
            dist.broadcast(torch.zeros(1), 1, async_op=True)
            raise RuntimeError("a kernel failed")
        while not pid.exists():
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            while True:
                os.kill(int(pid.read_text()), 0)
                time.sleep(0.01)
        os._exit(0)

    _when(moment, n, act)


def leaving(hangs: bool) -> None:
    """Let each rank that leaves the process group write the file `left-<rank>`, and then, if asked, hang for ever."""
    leave = dist.destroy_process_group

    def left() -> None:
        Path(f"left-{processes.rank()}").touch()
        while hangs:
            time.sleep(1)
        leave()

    dist.destroy_process_group = left


def signal_torchrun(moment: str, n: int, number: int) -> None:
    """Send torchrun a signal at a moment, and go on once torchrun has sent it here."""
    read, write = os.pipe()
    os.set_blocking(write, False)

    def act(_: object) -> None:
        signal.set_wakeup_fd(write)
        if processes.rank() == 0:
            os.kill(os.getppid(), number)
        os.read(read, 1)

    _when(moment, n, act)


def patience(timeout: float = 60.0, roll_call: float = 0.3) -> None:
    """How many seconds processes wait for each other."""
    distributed.TIMEOUT = timedelta(seconds=timeout)
    distributed.ROLL_CALL = roll_call


def stop_interval(steps: int) -> None:
    """How many steps share a message about signals."""
    distributed.STOP_INTERVAL["cpu"] = steps


def gpus(count: int) -> None:
    """Let this machine seem to have as many GPUs."""
    torch.cuda.device_count = lambda: count  # type: ignore[assignment]


def no_links() -> None:
    """Let the file system have no hard links."""

    def link(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    setattr(os, "link", link)  # noqa: B010


def largest_file(size: int) -> None:
    """Let the kernel refuse to make any file larger than `size` bytes."""
    resource = importlib.import_module("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def serve() -> None:
    """Answer requests until stdin ends."""
    importlib.import_module("torch._dynamo")  # by DistributedDataParallel and optimizers, which takes seconds
    for script in SCRIPTS:
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
        if processes > 1:
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
            child, status = os.waitpid(-1, (os.WNOHANG if failed or len(self.codes) > 1 else 0) | os.WUNTRACED)
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
