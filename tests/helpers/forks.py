"""Real processes for tests that kill them: forked from one that has imported torch, which takes seconds.

`python forks.py` is that one: it reads a `Task` a line, as JSON, and answers with an `End`. Tests use `Forks`.
"""

import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

ROOT = Path(__file__).resolve().parents[2]
STEPS_OF_A_WRITE = {
    *("open", "flock", "write", "flush", "fsync", "chmod"),
    *("unlink", "link", "replace", "close"),
}
"""Functions written in C, by name: those with which roundoff.runs.files
changes or fixes what is on the disk."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A program to run, and how it is killed.

    Attributes:
        folder: its working directory.
        command: the script's name, without ".py", and its flags.
        seconds: after which it is killed, wherever it is; None for never.
        write: the first checkpoint, counted from 1, that it may be killed in the writing of.
        step: of that writing at which it is killed, such as "before fsync"; "" for none.
        times: that this step has come before, in the same writing.
        largest_file: in bytes, as a limit of the system; None for none.
    """

    folder: str
    command: list[str]
    seconds: float | None = None
    write: int = 1
    step: str = ""
    times: int = 0
    largest_file: int | None = None


class End(NamedTuple):
    """How it went.

    Attributes:
        code: exit code; None after a kill.
        seconds: that it ran for.
        at: the step of a write that it was killed at, such as "before fsync"; "" where it was not.
        steps: of the longest checkpoint's writing that it came through.
        out: what it printed on stdout.
        err: what it printed on stderr.
    """

    code: int | None
    seconds: float
    at: str
    steps: list[str]
    out: str
    err: str


class Forks:
    """The parent process. A context: at its end that process is gone."""

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen([sys.executable, __file__], env=environment, stdin=-1, stdout=-1, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, folder: Path, *command: str, **task: Any) -> End:
        """Run `python script.py flags` in `folder`; `task` has the other attributes of `Task`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(dataclasses.asdict(Task(str(folder), list(command), **task))), file=self._process.stdin)
        self._process.stdin.flush()
        code, seconds, at, steps = json.loads(self._process.stdout.readline())
        out, err = ((folder / f".{name}").read_text() for name in ("out", "err"))
        for name in ("out", "err"):
            (folder / f".{name}").unlink()
        return End(code, seconds, at, steps, out, err)


class _Steps:
    """Notes the steps of each checkpoint's writing, and stops at the one that was asked for until the kill."""

    def __init__(self, task: Task, pipe: int) -> None:
        self.task = task
        self.pipe = pipe
        self.writes = 0
        self.steps: list[str] = []
        self.longest: list[str] = []
        original = lm.training.loop.write_checkpoint

        def watched(*args: Any) -> None:
            self.writes += 1
            self.steps = []
            sys.setprofile(self)
            try:
                original(*args)
            finally:
                sys.setprofile(None)
            self.longest = max(self.longest, self.steps, key=len)

        lm.training.loop.write_checkpoint = watched

    def tell(self, at: str = "") -> None:
        """Send the parent the one line that it waits for."""
        os.write(self.pipe, f"{json.dumps([at, self.longest])}\n".encode())

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return") or function.__name__ not in STEPS_OF_A_WRITE:
            return
        step = f"{'before' if event == 'c_call' else 'after'} {function.__name__}"
        if self.writes >= self.task.write and (step, self.steps.count(step)) == (self.task.step, self.task.times):
            self.tell(step)
            while True:
                signal.pause()
        self.steps.append(step)


def _child(task: Task, pipe: int, streams: list[int]) -> NoReturn:
    code = 99
    try:
        os.chdir(task.folder)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        if task.largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task.largest_file, task.largest_file))
        steps = _Steps(task, pipe)
        sys.argv = [f"{task.command[0]}.py", *task.command[1:]]
        try:
            module = importlib.import_module(task.command[0])
            code = run_trainer(module.main, module.__file__, module.__doc__)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        steps.tell()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(task: Task) -> tuple[int | None, float, str, list[str]]:
    ours, theirs = os.pipe()
    streams = [os.open(f"{task.folder}/.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")]
    start = time.monotonic()
    child = os.fork()
    if not child:
        _child(task, theirs, streams)
    for descriptor in (theirs, *streams):
        os.close(descriptor)
    at, steps = "", []
    with os.fdopen(ours) as pipe:
        in_time = select.select([pipe], [], [], task.seconds)[0]
        if in_time and (line := pipe.readline()):
            at, steps = json.loads(line)
    if at or not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    return code, time.monotonic() - start, at, steps


if __name__ == "__main__":
    import resource

    import torch

    import lm.training.loop
    from lm.launch.entry import run_trainer

    torch.set_num_threads(1)
    for script in ("main", "main_fp16_optimizer", "main_amp"):
        importlib.import_module(script)
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer imports half of torch
    for line in sys.stdin:
        print(json.dumps(_run(Task(**json.loads(line)))), flush=True)
