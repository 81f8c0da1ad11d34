"""The runs of a comparison: each is its trainer's own command in a process of its own. What has ended is kept.

A comparison has one folder. `compare.json` there says what was asked for. For each mode and seed there are the run
directory `runs/<label>-<seed>`, with model.safetensors in it, and the trainer's output `runs/<label>-<seed>.log`.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data import corpora
from lm.launch.progress import Progress
from lm.options.command_line import make_parser, read_command_line
from lm.options.config import merge
from lm.options.modes import MODES
from lm.options.options import as_values, flag, options_of, words
from lm.options.resolve import OF_DYNAMIC_SCALE, without_effect
from roundoff.errors import RunError, UsageError, printable
from roundoff.runs.files import lock, unlock
from roundoff.runs.jsonfile import as_read_back, read_object, write_json
from roundoff.terminal import say
from roundoff.verdict.types import Failure

ROOT = Path(__file__).resolve().parent.parent.parent
"""Where the scripts are."""
OWN = ("run_dir", "resume", "save", "fp16", "dtype", "dynamic_loss_scale")
"""The options in which the runs of a comparison differ. They cannot be given to all of them."""
PLACES = ("run_dir", "save")
"""Options that say where a run's files are. The folder of a comparison may be moved."""
POLL = 0.1  # seconds between two looks at the processes
GRACE = 30.0  # seconds that a trainer has to write its checkpoint; Kubernetes and Slurm give as many


def python(script: str) -> list[str]:
    """Return the words that start a script of this project."""
    return [sys.executable, str(ROOT / f"{script}.py")]


@dataclass(frozen=True)
class Job(ABC):
    """A process to run, whose results go to a directory.

    Attributes:
        label: of what it does, such as the name of a mode.
        seed: of the run.
        run_dir: where its results go.
    """

    label: str
    seed: int
    run_dir: Path

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line as a list."""

    @abstractmethod
    def result(self) -> dict[str, Any] | None:
        """Return how the job ended, with its "status"; None unless the directory holds this very job, and its end."""

    def resumed(self) -> list[str] | None:
        """Return the command line that goes on with what the directory holds; None if nothing there can be used."""
        return None

    @property
    def log(self) -> Path:
        """Return the place of what the process prints on stdout and stderr."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")

    def failure(self, exit_code: int) -> Failure:
        """Return the failure of this job, with the last line that it printed."""
        said = self.log.read_bytes()[-4096:].decode(errors="replace") if self.log.exists() else ""
        message = (said.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        if exit_code < 0:
            message = f"{signal.strsignal(-exit_code)} (signal {-exit_code}); its last line: {message}"
        return Failure(self.label, self.seed, self.command, exit_code, message)


@dataclass(frozen=True)
class Training(Job):
    """A run of a trainer; `label` is a key of `MODES`.

    Attributes:
        options: of the trainer, checked, equal for every run of a comparison.
    """

    options: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        """See `Job.command`."""
        return [*python(MODES[self.label].script), *words(self.all_options())]

    def all_options(self) -> dict[str, Any]:
        """Return the options of this run: those of its mode and of the comparison, its seed and its places.

        Those of the comparison that change nothing in this mode are left out: its trainer would refuse them.
        """
        mode = MODES[self.label]
        found = {**mode.options, **self.options, "seed": self.seed, **self._places}
        if found.keys() & set(OF_DYNAMIC_SCALE):
            for name in without_effect(merge(mode.script, found), list(found)):
                del found[name]
        return found

    @property
    def _places(self) -> dict[str, Path]:
        return {"run_dir": self.run_dir, "save": self.run_dir / "model.safetensors"}

    def resumed(self) -> list[str] | None:
        """See `Job.resumed`. The folder may have been moved since."""
        places = {"resume": self.run_dir, "save": self._places["save"]}
        return [*python(MODES[self.label].script), *words(places)] if self._started() else None

    def result(self) -> dict[str, Any] | None:
        """See `Job.result`; it is the content of result.json."""
        try:
            result = read_object(self.run_dir / "result.json")
            return result if self._started() and isinstance(result["status"], str) else None
        except (UsageError, OSError, ValueError, LookupError):
            return None

    def _started(self) -> bool:
        """Return whether the directory holds the beginning of this very run, wherever the comparison lay then."""
        try:
            stored = read_object(self.run_dir / "config.json")["options"]
            expected = merge(MODES[self.label].script, self.all_options())
            return _without_places(stored) == _without_places(as_read_back(as_values(expected)))
        except (UsageError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return False


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in PLACES}


def check_flags(modes: Sequence[str], argv: Sequence[str]) -> tuple[int, dict[str, Any], str]:
    """Read the trainers' flags `argv` as each of `modes` would; return the seed, the other options, and the device.

    Raises:
        UsageError: some trainer would refuse them, or they are for one run and not for all.
    """
    given = read_command_line(make_parser(None, None), None, list(argv))
    for name in given:
        if name in OWN:
            raise UsageError(f"{flag(name)} after -- is set by compare.py itself, for each mode; leave it out")
        if name == "onnx_export":
            raise UsageError(
                f"{flag(name)} after -- names one file for all runs; give it to a trainer with --resume RUN_DIR"
            )
    used: set[str] = set()
    for mode in (MODES[label] for label in modes):
        for name in given:
            if name not in options_of(mode.script):
                raise UsageError(f"{flag(name)} after --: {mode.script}.py (mode {mode.name}) has no such option")
        args = merge(mode.script, {**mode.options, **given})
        used |= given.keys() - set(without_effect(args, given))
    if unused := [name for name in given if name not in used]:
        raise UsageError(
            f"{flag(unused[0])} after --: none of the modes {','.join(modes)} has a dynamic loss scale; leave it out, "
            "or give --modes with one that has, such as amp-fp16"
        )
    corpora.read(args.data)
    given.pop("seed", None)
    return args.seed, given, args.device


def slot_environments(jobs: int, device: str) -> list[dict[str, str]]:
    """Return the environment of each of the `jobs` runs at a time: a GPU, or its share of the CPU's threads."""
    if jobs == 1:
        return [{}]
    import torch  # here, since it takes seconds

    if device == "cpu":
        return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}] * jobs
    if device == "cuda" and (count := torch.cuda.device_count()) > 1:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = names[:count] if len(names) >= count else [str(i) for i in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": names[slot % count]} for slot in range(jobs)]
    return [{}] * jobs


@contextmanager
def comparison_folder(out: Path, plan: dict[str, Any]) -> Iterator[int | None]:
    """Make the folder `out` for the runs of `plan`, or find those that it holds; nobody else may use it meanwhile.

    Gives the file descriptor of a lock, for the trainers to inherit. They hold the folder too, should this process be
    killed. Windows lets no process inherit a descriptor: there each trainer holds its own run directory alone.

    Raises:
        UsageError: `out` holds something else or the runs of another plan, is in use, or cannot be written.
    """
    with ExitStack() as stack:
        try:
            _check_plan(out, plan)
            (out / "runs").mkdir(parents=True, exist_ok=True)
            taken = lock(out / "runs")
            stack.callback(unlock, taken)
            write_json(out / "compare.json", plan, indent=2)
        except BlockingIOError:
            raise UsageError(
                f"--out {out} is in use by another compare.py or its trainers; wait for their end"
            ) from None
        except OSError as error:
            raise UsageError(f"--out {out}: cannot write there ({error.strerror}); give another directory") from None
        yield taken


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        before = read_object(out / "compare.json")
        changed = [
            f"{name} {printable(before[name])}, now {value}"
            for name, value in as_read_back(plan).items()
            if before[name] != value
        ]
    except (UsageError, OSError, LookupError):
        raise UsageError(f"--out {out} holds something else than runs of compare.py; give a new directory") from None
    if changed:
        raise UsageError(f"--out {out} was made with {'; '.join(changed)}; give the same again, or a new directory")


def run_jobs(jobs: Sequence[Job], environments: Sequence[dict[str, str]], lock: int | None) -> list[Failure]:
    """Run `jobs`, as many at a time as there are `environments`, but not those that have ended already.

    A job that fails leaves the others alone. Ctrl-C, SIGTERM and SIGHUP end all processes; what has ended stays.

    Raises:
        KeyboardInterrupt: after an interrupt.
    """
    failures: list[Failure] = []
    waiting: list[Job] = []
    for job in jobs:
        result = job.result()
        if result is None or result["status"] not in ("finished", "diverged"):
            waiting.append(job)
        else:
            failures += _ended(job, RunError.exit_code if result["status"] == "diverged" else 0, "kept")
    running: dict[int, _Process] = {}
    with ExitStack() as stack:
        interrupted = stack.enter_context(_stop_on_signal())
        progress = stack.enter_context(Progress(len(jobs), len(jobs) - len(waiting)))
        stack.callback(_kill, running)
        while waiting or running:
            for slot, environment in enumerate(environments):
                if waiting and slot not in running:
                    running[slot] = _Process(waiting.pop(0), environment, lock)
            progress.show([(f"{p.job.label} seed {p.job.seed}", p.job.run_dir) for p in running.values()])
            if interrupted.wait(POLL):
                _stop(running)
                raise KeyboardInterrupt
            for slot in [slot for slot, process in running.items() if process.popen.poll() is not None]:
                process = running.pop(slot)
                progress.count()
                failures += _ended(process.job, process.popen.returncode, f"{process.seconds():.1f}s")
    return failures


class _Process:
    """A job that runs."""

    def __init__(self, job: Job, environment: dict[str, str], lock: int | None) -> None:
        self.job = job
        self.start = time.monotonic()
        command = job.resumed()
        if command is None and job.run_dir.exists():
            shutil.rmtree(job.run_dir)
        with job.log.open("ab") as log:
            self.popen = subprocess.Popen(  # noqa: S603
                command or job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                pass_fds=[] if lock is None or os.name == "nt" else [lock],
            )

    def seconds(self) -> float:
        """Return the seconds since its start."""
        return time.monotonic() - self.start


def _ended(job: Job, exit_code: int, how: str) -> list[Failure]:
    """Say how `job` has ended; return its failure, if it is one."""
    result = job.result() or {"status": "failed"}
    line = f"| {job.label:22} | seed {job.seed} | {result['status']:11} | "
    if result.get("test_ppl") is not None:
        line += f"test ppl {float(result['test_ppl']):8.2f} | "
    failures = [job.failure(exit_code)] if exit_code or result["status"] == "failed" else []
    say(line + how + "".join(f" | exit code {exit_code}: {failure.message}" for failure in failures))
    return failures


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Give an event that SIGINT, SIGTERM and SIGHUP set. Each would leave the trainers running. A second SIGINT raises.

    SIGTERM and SIGHUP stay ignored where they are, as under nohup.
    """
    stopped = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    asked = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    others = [number for number in asked if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *others)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(running: dict[int, _Process]) -> None:
    """Let the trainers write their checkpoints and end, for a while."""
    for process in running.values():
        process.popen.terminate()
    deadline = time.monotonic() + GRACE
    for process in running.values():
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            break


def _kill(running: dict[int, _Process]) -> None:
    for process in running.values():
        process.popen.kill()
        process.popen.wait()
