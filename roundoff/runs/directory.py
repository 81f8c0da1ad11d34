"""The run directory: everything that is known of a run afterwards, as files that any program can read.

`config.json` is written when training starts. `steps.jsonl` and `epochs.jsonl` grow with it. `result.json` is written
at its end. JSON has no inf or nan: such values stand as the strings "inf", "-inf" and "nan", which Python's float()
and JavaScript's Number() (but for "inf") read back.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from roundoff import processes
from roundoff.errors import UsageError, described, printable
from roundoff.precision import StepResult
from roundoff.runs.config_file import check_config, describe_device, describe_run, guess_device, read_config
from roundoff.runs.files import LOCK, lock, naming, remove_leftovers, sync, unlock
from roundoff.runs.given import loss_number, number, whole_number
from roundoff.runs.json_text import scalar, to_json
from roundoff.runs.jsonfile import as_read_back, unwritable, write_json
from roundoff.runs.listeners import Listener, current_listeners
from roundoff.runs.meter import Derived, Meter, losses
from roundoff.runs.reading import MAX_LINE_BYTES, MOST_LOSSES, misfit
from roundoff.runs.waiting import WaitingSteps

LINES = ("steps.jsonl", "epochs.jsonl")
FILES = ("config.json", *LINES, "result.json")
OF_A_RUN = (*FILES, "checkpoint.safetensors")
"""Files that no two runs may share. Whoever resumes the run may keep a checkpoint there."""
START = dict.fromkeys(("steps", "skipped", *LINES), 0)
"""The `RunDirectory.state` of a run that has recorded nothing."""


class Names(NamedTuple):
    """How errors name the arguments of a `RunDirectory`; a program has its options in place of these."""

    path: str = "path="
    """of a new run; the path follows"""
    resumed: str = "resume=True, path="
    """of a run that goes on; the path follows"""
    resume: str = "RunDirectory.resume(path, state)"
    """what goes on with a run; a program's option ends in a blank, and the path follows"""


class RunDirectory:
    """Writes the record of one run, and tells listeners of it.

        with RunDirectory("runs/bf16-1", job={"model": "cnn", "lr": 0.05}, mode="bf16", seed=1) as run:
            for batch in data:
                ...
                run.step(loss, result)
            run.finish(test_loss=test_loss)     # or run.finish() without a test

    A loop that validates calls `run.epoch(valid_loss)` after each epoch. See `resume` for a run that goes on. A block
    that ends by an exception, or without `finish`, is recorded as an interrupted run with all of its steps.

    No other process may write to the directory until `close`. Steps stay on the device until `flush` fetches them all
    with a single wait. In a distributed run, the process of rank 0 writes, and `path` is None in others.

    Args:
        path: the directory. A new run makes it; it may be there, but hold no run. None: `runs/<name>-<time>`.
        job: what must be equal for two runs to be compared, such as the model and the learning rate.
        mode: name of the precision mode.
        seed: of the run; by default 0.
        dtype: of the mode's products, such as torch.float16.
        loss_scale: the static loss scale, or "dynamic" where a rule moves it; None leaves it to the steps, which record
            theirs.
        equals: names of the modes whose losses this mode must equal to the bit.
        device: that the run trains on; by default that of the first tensor that `step` is given.
        unit: of the losses, such as "nats a word" or "nats a token" (whose exp is a perplexity, which reports then
            show) or "bits a byte". None: reports say "loss".
        length: names of fields of the job that say how long training goes, and change no step.
        config: the whole of `config.json`, in place of all from `job` to `length`.
        name: of a directory without a path; by default the mode.
        resume: go on with the run that the directory holds. `go_back` must follow; `RunDirectory.resume` does both.
        listeners: hear of all that is recorded, before those of the `listening` blocks around `start`. See `Listener`.
        derived: figures that follow from a mean loss, to be recorded beside it, such as {"ppl": perplexity}.
        average: returns the mean over all processes of each of the losses (fp32, shape (steps,)) that it is given.
        names: how errors name the arguments.
        interval: number of steps after which `step` flushes and ends an interval; None: the caller does both.

    Raises:
        UsageError: the directory is in use or cannot be written, a new run's holds a run already, or one that goes on
            holds none, or one of another job, mode or seed. Or `read_run` would refuse what is given.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        job: Mapping[str, Any] | None = None,
        mode: str = "",
        seed: int | None = None,
        dtype: torch.dtype | str | None = None,
        loss_scale: float | str | None = None,
        equals: Iterable[str] = (),
        device: torch.device | str | None = None,
        unit: str | None = None,
        length: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        resume: bool = False,
        listeners: Iterable[Listener] = (),
        derived: Derived | None = None,
        average: Callable[[Tensor], Tensor] = lambda values: values,
        interval: int | None = 100,
        names: Names | None = None,
    ) -> None:
        if isinstance(loss_scale, str) and loss_scale != "dynamic":
            raise UsageError(f'loss_scale={printable(repr(loss_scale))}: give a number, or "dynamic"')
        if not isinstance(unit, str | None):
            raise UsageError(f'unit is {described(unit)}; give a text, such as "nats a word"')
        equal, fields = _names_in("equals", equals), _names_in("length", length)
        precision = {"mode": mode, "dtype": dtype, "loss_scale": loss_scale, "equals": equal or None}
        more = {"loss_unit": unit, "length": fields or None}
        self.config = describe_run(job, precision, seed, more) if config is None else dict(config)
        if not resume:
            check_config(self.config)
        self._names = names or Names()
        self._names_device = config is None and not resume
        if self._names_device and device is not None:
            try:
                self._name_device(torch.device(device))
            except (RuntimeError, AssertionError, TypeError, ValueError):
                here = 'give one that torch finds here, such as "cpu" or "cuda:0"'
                raise UsageError(f"device is {described(device)}; {here}") from None
        self.path: Path | None = None
        self.steps = self.skipped = 0
        self.ended = self._has_result = False
        self._test_loss: float | None = None
        self._lock: int | None = None
        self._listeners = _checked_listeners(listeners)
        self._derived = derived or {}
        self._average = average
        self._interval = interval
        self._waiting = WaitingSteps()
        self._tokens = 0
        self._epoch, self._epoch_start = 1, time.monotonic()
        self._meter = Meter(self._derived)
        if resume and path is None:
            raise UsageError("resume=True without a path names no run; give its directory as path")
        if processes.rank() > 0:
            return
        place = None if path is None else Path(path)
        if place is None or not resume:
            self._create(place, name or mode or "run")
            return
        where = f"{self._names.resumed}{place}"
        with _clear_errors(where, "open it", "give a run directory"), self._closing_on_error():
            self._reopen(place, where)
            if config is None:
                self.config = read_config(place, job, mode, seed, where)
                self._names_device = "device" not in self.config["environment"]

    @classmethod
    def resume(cls, path: Path | str, state: Mapping[str, int] | None, **options: Any) -> Self:
        """Return the run directory of a run that goes on from a checkpoint.

            torch.save({"model": model.state_dict(), "run": run.state()}, "checkpoint.pt")     # during training
            ...
            with RunDirectory.resume("runs/bf16-1", torch.load("checkpoint.pt")["run"]) as run:     # some other day

        What was recorded after the checkpoint is forgotten.

        Args:
            path: of the directory.
            state: what `state` returned when the checkpoint was written; None where the run begins anew.
            options: of `RunDirectory`. `job`, `mode` and `seed` may be left out; those given must be those of the run.

        Raises:
            UsageError: the directory holds no run, is in use, or has recorded less than `state` says.
        """
        options.setdefault("names", Names(resumed="RunDirectory.resume: path="))
        run = cls(path, resume=True, **options)
        with run._closing_on_error():
            try:
                run.go_back(dict(START if state is None else state))
            except (ValueError, LookupError, TypeError) as error:
                where = f"{run._names.resumed}{path}"
                raise UsageError(f"{printable(where)}: state is not one of this run ({printable(error)})") from None
        return run

    def _create(self, path: Path | None, name: str) -> None:
        """Take the directory of a new run. `config.json` is its first file: from then on the run can be resumed."""
        where = "runs" if path is None else f"{self._names.path}{path}"
        with _clear_errors(where, "write there", "give another directory"):
            new = path is None or not path.exists()
            path = _new_directory(name, self._names.path) if path is None else path
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
            made: list[Path] = []
            try:
                if any(os.path.lexists(path / file) for file in OF_A_RUN):
                    resume = self._names.resume
                    resume += str(path) if resume.endswith(" ") else ""
                    raise UsageError(f"{where} holds a run already; give a new one, or {resume} to go on with it")
                self.path = path
                made = [path / file for file in ("config.json", *LINES)]
                self.write_config()
                for file in made[1:]:
                    file.touch()
            except BaseException:
                self._undo(path, made, new)
                raise

    def _undo(self, path: Path, made: list[Path], new: bool) -> None:
        """Remove the files `made`, and the directory if it is `new`; let go of it."""
        with suppress(OSError):
            for file in made:
                file.unlink(missing_ok=True)
        self.close()
        with suppress(OSError):
            if new:
                (path / LOCK).unlink(missing_ok=True)  # that of Windows, which removes no open file
                path.rmdir()

    def _reopen(self, path: Path, where: str) -> None:
        """Take the directory of a run that goes on."""
        self._lock = lock(path)
        if not (path / "config.json").exists():
            raise UsageError(f"{where} holds no run (there is no config.json); give a run directory")
        for name in OF_A_RUN:
            remove_leftovers(path, name)
        self.path = path

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """Let go of the directory if the block fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Tell the listeners that training begins, or goes on from here."""
        if self.path is None:
            return
        self._listeners += current_listeners()
        with self._closing_on_error():
            self._tell("start", self.path, self.config, self.steps)

    def _tell(self, event: str, *said: Any) -> None:
        """Call a method of every listener; then raise the first error of theirs, with a note that says whose it is."""
        errors = []
        for listener in self._listeners if self.path is not None else ():
            try:
                getattr(listener, event)(*said)
            except Exception as error:
                name = type(listener).__name__
                error.add_note(f"The listener {name} raised this in `{event}`. The record in {self.path} is whole.")
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Let others write to the directory."""
        unlock(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        self.start()
        self.begin_interval()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Record a run as interrupted that ends without `finish`; no full disk and no listener hides its reason.

        After an error of one of several processes, steps that were not flushed are lost: to flush takes all of them.
        """
        hidden = OSError if error is None else Exception
        ends: list[Callable[[], object]] = []
        if not self.ended:
            ends = [partial(self.write_result, "interrupted", self._test_loss), self.end_interval]
            ends += [self.flush] if error is None or processes.world_size() == 1 else []
        with ExitStack() as last:  # from the last to the first, each whatever the others raise
            last.callback(self.close)
            for do in ends:
                last.enter_context(suppress(hidden))
                last.callback(do)

    def state(self) -> dict[str, int]:
        """Flush, and return how much has been recorded, for `go_back`; by then it is on the disk.

        In a distributed run all processes call it, or all have flushed every step.
        """
        self.flush()
        lengths = {}
        for name in LINES:
            lengths[name] = 0
            if self.path is not None:
                with naming(self.path / name), (self.path / name).open("ab") as file:
                    sync(file)
                    lengths[name] = file.tell()
        return {"steps": self.steps, "skipped": self.skipped} | lengths

    def go_back(self, state: dict[str, int]) -> None:
        """Forget what was recorded after `state`, with a line that a crash cut in two.

        Raises:
            ValueError: less than that has been recorded.
        """
        epochs = [0 if self.path is None else _last_epoch(self.path / name, state[name]) for name in LINES]
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.ended = self._has_result = False
        self._test_loss = None
        self._waiting.clear()
        self._tokens = 0
        self._meter.restart()
        self._epoch, self._epoch_start = max(1, epochs[0], epochs[1] + 1), time.monotonic()
        if self.path is None:
            return
        for name in LINES:
            with (self.path / name).open("ab") as file:
                file.truncate(state[name])
        (self.path / "result.json").unlink(missing_ok=True)  # that of an interrupted run, or of fewer epochs

    def write_config(self) -> None:
        """Write `config.json`."""
        if self.path is not None:
            write_json(self.path / "config.json", self.config, indent=2)

    def step(
        self,
        loss: Tensor | float,
        result: StepResult | None = None,
        *,
        grad_norm: Tensor | float | None = math.nan,
        loss_scale: Tensor | float = 1.0,
        applied: Tensor | bool = True,
        epoch: int | None = None,
        lr: Tensor | float = math.nan,
        tokens: int = 0,
        losses: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Keep the row of one step.

        Args:
            loss: fp32, of one element.
            result: of the optimizer's step, in place of the three that follow.
            grad_norm: of all gradients, before clipping; nan or None where it is not known.
            loss_scale: that the loss was multiplied by.
            applied: whether the weights were updated.
            epoch: by default 1, and one more after each call of `epoch`.
            lr: of this step.
            tokens: that the step trained on, in all processes.
            losses: further losses by name, such as {"kl": kl}, each of one element; at most 16 names.

        Raises:
            UsageError: the run has ended, there are more further losses, or an argument is something else. The step is
                not recorded then.
        """
        self._refuse_after_end()
        if not isinstance(losses, Mapping | None):
            raise UsageError(f'losses is {described(losses)}; give a mapping, such as {{"kl": kl}}')
        more = tuple(losses or ())
        if len(more) > MOST_LOSSES:
            raise UsageError(f"losses has {len(more)} names; at most {MOST_LOSSES} are recorded")
        if result is not None:
            if not all(hasattr(result, name) for name in StepResult._fields):
                raise UsageError(f"result is {described(result)}; give what precision.step returned, or grad_norm=...")
            grad_norm, loss_scale, applied = result.grad_norm, result.loss_scale, result.applied
        norm = math.nan if grad_norm is None else grad_norm
        named = {"loss": loss, "grad_norm": norm, "loss_scale": loss_scale, "applied": applied}
        figures = [number(name, value) for name, value in named.items()]
        figures += [number(f"losses[{name!r}]", value) for name, value in (losses or {}).items()]
        at = self._epoch if epoch is None else whole_number("epoch", epoch)
        row = {"step": self.steps + 1, "epoch": at, "lr": float(number("lr", lr))}
        number("tokens", tokens)
        if self._waiting and more != self._waiting.more:
            self.flush()
        device = guess_device(figures)
        if self._names_device:
            self._name_device(device)
            self.write_config()
        self._waiting.add(row, figures, device, more)
        self.steps += 1
        self._tokens += tokens
        if self._interval and self.steps % self._interval == 0:
            self.flush()
            self.end_interval()

    def _refuse_after_end(self) -> None:
        if self.ended:
            raise UsageError("the run has ended; a new RunDirectory, or RunDirectory.resume, records more")

    def _name_device(self, device: torch.device | str) -> None:
        """Let `config.json` say what the run trains on."""
        self.config["environment"] |= describe_device(device)
        self._names_device = False

    def flush(self) -> list[dict[str, Any]]:
        """Fetch the steps since the last call from the device, append them to `steps.jsonl`, and return their rows."""
        if not self._waiting:
            return []
        rows = self._waiting.fetch(self._average)
        self._append("steps.jsonl", rows)
        self._waiting.clear()
        self.skipped += sum(not row["applied"] for row in rows)
        self._meter.add(rows, self._tokens)
        self._tokens = 0
        return rows

    def begin_interval(self) -> None:
        """Begin an interval now, so that no validation counts in its time."""
        self._meter.restart()

    def end_interval(self, **more: Any) -> None:
        """Tell the listeners of the steps that were flushed since the last call, if there are any, and of `more`."""
        if self._meter.steps == 0:
            return
        self._tell("interval", self._meter.end() | more)

    def epoch(
        self,
        valid_loss: Tensor | float,
        *,
        epoch: int | None = None,
        lr: Tensor | float = math.nan,
        seconds: float | None = None,
    ) -> None:
        """Append a row to `epochs.jsonl`.

        Args:
            valid_loss: mean over the validation data.
            epoch: by default 1, and one more after each call.
            lr: of the steps of the epoch.
            seconds: that training and validation took; by default, since the last call.

        Raises:
            UsageError: the run has ended, an argument is no number, or `read_run` would refuse it.
        """
        self._refuse_after_end()
        row: dict[str, Any] = {"epoch": self._epoch if epoch is None else whole_number("epoch", epoch)}
        row |= losses(loss_number("valid_loss", valid_loss), self._derived, "valid_")
        row |= {"lr": float(number("lr", lr)), "seconds": 0.0 if seconds is None else float(number("seconds", seconds))}
        _refuse_misfit("epochs.jsonl", row)
        if self._interval:
            self.flush()
        now = time.monotonic()
        if seconds is None:
            row["seconds"] = now - self._epoch_start
        self._append("epochs.jsonl", [row])
        self._epoch, self._epoch_start = row["epoch"] + 1, now
        try:
            if self._interval:
                self.end_interval()
            self._tell("epoch", row | {"step": self.steps})
        finally:
            self.begin_interval()

    def finish(self, test_loss: Tensor | float | None = None, **figures: Any) -> None:
        """Record that the run has come to its end, with its loss on the test data and other figures.

        Raises:
            UsageError: the run has ended, or `write_result` refuses a figure. `finish` can be called again then.
        """
        self._refuse_after_end()
        self.flush()
        try:
            self.end_interval()
        finally:  # no listener makes a run that has finished an interrupted one
            self.write_result("finished", test_loss, **figures)

    def write_result(self, status: str, test_loss: Tensor | float | None, /, **figures: Any) -> None:
        """Tell the listeners of the end, once, and write `result.json`, unless an earlier call has written it.

        Args:
            status: "finished", "interrupted" or "diverged".
            test_loss: mean over the test data; None without a test.
            figures: more for `result.json`.

        Raises:
            UsageError: no file can hold one of the figures, `read_run` would refuse it, or the record has a figure of
                that name itself. Nobody has been told of the end then. A block that ends so keeps the test loss.
        """
        self._test_loss = None if test_loss is None else loss_number("test_loss", test_loss)
        row: dict[str, Any] = {"status": status} | losses(self._test_loss, self._derived, "test_")
        row |= {"steps": self.steps - len(self._waiting), "skipped": self.skipped}
        for name in figures:
            if name in row:
                raise UsageError(f"figure {printable(name)} is one that the record has itself; give another name")
        row |= {name: scalar(figure) for name, figure in figures.items()}
        _refuse_misfit("result.json", row, "figure ")
        told, self.ended = self.ended, True
        if self.path is None or self._has_result:
            return
        try:
            if not told:
                self._tell("result", row)
        finally:  # last: a disk that is full hides the result from nobody
            write_json(self.path / "result.json", row, indent=2)
            self._has_result = True

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append `rows` to a file; if that fails, none of them, as a torn one would spoil those that follow."""
        if self.path is None:
            return
        path = self.path / name
        with naming(path):
            length = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8", newline="\n") as file:
                    file.writelines(to_json(row) + "\n" for row in rows)
            except BaseException:
                with suppress(OSError):
                    os.truncate(path, length)
                raise


def _names_in(argument: str, given: Any) -> list[str]:
    """Return `given` as a list; refuse a text, which is a list of letters."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        example = f", such as [{printable(repr(given), 60)}]" if isinstance(given, str) else ""
        raise UsageError(f"{argument} is {described(given)}; give a list of names{example}")
    return list(given)


def _checked_listeners(given: Any) -> list[Listener]:
    """Return `given` as a list; refuse what could not be told of every event, before it is too late."""
    events = ("start", "interval", "epoch", "result")
    if not isinstance(given, Iterable):
        raise UsageError(f"listeners is {described(given)}; give a list of objects with {', '.join(events)}")
    found = list(given)
    for listener in found:
        name = listener.__name__ if isinstance(listener, type) else type(listener).__name__
        lacks = [event for event in events if not callable(getattr(listener, event, None))]
        if lacks or isinstance(listener, type):
            what = f"lacks {', '.join(lacks)}" if lacks else "is a class"
            raise UsageError(f"listener {printable(name)} {what}; give an object of a subclass of roundoff.Listener")
    return found


def _refuse_misfit(file: str, row: dict[str, Any], start: str = "") -> None:
    """Raise UsageError unless `read_run` takes `row`."""
    for name, value in row.items():
        if problem := unwritable(value, name):
            raise UsageError(start + problem)
    if problem := misfit(file, as_read_back(row)):
        raise UsageError(start + problem)


def _last_epoch(path: Path, length: int) -> int:
    """Return the epoch of the last row in the first `length` bytes of a .jsonl file; 0 without a row.

    Raises:
        ValueError: the file has fewer bytes, or no row ends there.
    """
    size = path.stat().st_size if path.exists() else 0
    if not 0 <= length <= size:
        raise ValueError(f"{path.name} has {size} bytes, not {length}")
    if length == 0:
        return 0
    with path.open("rb") as file:
        file.seek(max(0, length - MAX_LINE_BYTES))
        row = file.read(min(length, MAX_LINE_BYTES)).splitlines()[-1]
    try:
        return int(json.loads(row)["epoch"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{path.name} has no row that ends at byte {length}") from None


@contextmanager
def _clear_errors(where: str, cannot: str, advice: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise UsageError(f"{where} is in use by another run; wait for its end, or give another directory") from None
    except OSError as error:
        raise UsageError(f"{where}: cannot {cannot} ({error.strerror}); {advice}") from None


def _new_directory(name: str, option: str) -> Path:
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for n in range(1, 1000):
        path = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UsageError(f"{base} and 999 like it exist already; give {option.rstrip(' =')}")
