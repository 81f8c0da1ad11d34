"""The run directory: everything that is known of a run afterwards, as files that any program can read.

`config.json` is written when training starts. `steps.jsonl` and `epochs.jsonl` grow with it. `result.json` is written
at its end. JSON has no inf or nan: such values stand as the strings "inf", "-inf" and "nan", which Python's float()
and JavaScript's Number() (but for "inf") read back.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from roundoff import processes
from roundoff.errors import UsageError
from roundoff.precision import StepResult
from roundoff.runs.environment import environment
from roundoff.runs.files import lock, naming, remove_leftovers, sync, unlock, write_atomically
from roundoff.runs.jsonfile import to_json
from roundoff.runs.listeners import Listener, current_listeners
from roundoff.runs.meter import Derived, Meter, losses

LINES = ("steps.jsonl", "epochs.jsonl")
FILES = ("config.json", *LINES, "result.json")
START = dict.fromkeys(("steps", "skipped", *LINES), 0)
"""The `RunDirectory.state` of a run that has recorded nothing."""


class RunDirectory:
    """Writes the record of one run, and tells listeners of it.

        with RunDirectory("runs/bf16-1", job={"model": "cnn", "lr": 0.05}, mode="bf16", seed=1) as run:
            for batch in data:
                ...
                run.step(loss, result)
            run.finish(test_loss=test_loss)

    No other process may write to the directory until `close`. Steps stay on the device until `flush` fetches them all
    with a single wait. They are one tensor there: as one for each number they would lie in the holes that large
    tensors leave for the next step. In a distributed run, the process of rank 0 writes, and `path` is None in others.

    Args:
        path: the directory. A new run makes it; it may be there, but hold no run. None: `runs/<name>-<time>`.
        job: what must be equal for two runs to be compared, such as the model and the learning rate.
        mode: name of the precision mode.
        seed: of the run.
        config: the whole of `config.json`, in place of `job`, `mode` and `seed`.
        name: of a directory without a path; by default the mode.
        resume: go on with the run that the directory holds. `go_back` must follow.
        listeners: hear of all that is recorded, after those of the `listening` blocks around `start`.
        derived: figures that follow from a mean loss, to be recorded beside it, such as {"ppl": perplexity}.
        average: returns the mean over all processes of each of the losses (fp32, shape (steps,)) that it is given.
        interval: number of steps after which `step` flushes and ends an interval; None: the caller does both.

    Raises:
        UsageError: the directory is in use or cannot be written, or a new run's holds a run already.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        job: Mapping[str, Any] | None = None,
        mode: str = "",
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        resume: bool = False,
        listeners: Iterable[Listener] = (),
        derived: Derived | None = None,
        average: Callable[[Tensor], Tensor] = lambda values: values,
        interval: int | None = 100,
    ) -> None:
        given = {"job": job or {}, "precision": {"mode": mode}, "seed": seed}
        self.config = dict(config) if config is not None else given | {"environment": environment()}
        self.path: Path | None = None
        self.steps = self.skipped = 0
        self.ended = False
        self._lock: int | None = None
        self._listeners = list(listeners)
        self._derived = derived or {}
        self._average = average
        self._interval = interval
        self._pending: list[dict[str, Any]] = []
        self._values = torch.empty(0, 4)
        self._tokens = 0
        self._epoch, self._epoch_start = 1, time.monotonic()
        self._meter = Meter(self._derived)
        if processes.rank() > 0:
            return
        if resume and path is not None:
            self._reopen(Path(path))
        else:
            self._create(None if path is None else Path(path), name or mode)

    def _create(self, path: Path | None, name: str) -> None:
        """Take the directory of a new run. `config.json` is its first file: from then on the run can be resumed."""
        where = "runs" if path is None else f"--run-dir {path}"
        with _clear_errors(where, "write there", "give another directory"):
            new = path is None or not path.exists()
            path = _new_directory(name) if path is None else path
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
            try:
                if any(os.path.lexists(path / file) for file in FILES):
                    raise UsageError(
                        f"--run-dir {path} holds a run already; give a new one, or --resume {path} to go on with it"
                    )
                self.path = path
                self.write_config()
                for file in LINES:
                    (path / file).touch()
            except BaseException:
                if new:
                    with suppress(OSError):
                        path.rmdir()
                self.close()
                raise

    def _reopen(self, path: Path) -> None:
        with _clear_errors(f"--resume {path}", "open it", "give a run directory"):
            self._lock = lock(path)
        self.path = path
        remove_leftovers(path)

    def start(self) -> None:
        """Tell the listeners that training begins, or goes on from here."""
        if self.path is None:
            return
        self._listeners = [*current_listeners(), *self._listeners]
        for listener in self._listeners:
            listener.start(self.path, self.config, self.steps)

    def close(self) -> None:
        """Let others write to the directory."""
        unlock(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        self.start()
        self.begin_interval()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Record a run as interrupted that ends without `finish`; a full disk does not hide its reason."""
        try:
            if not self.ended:
                with suppress(OSError):
                    self.flush()
                    self.end_interval()
                    self.write_result("interrupted", None)
        finally:
            self.close()

    def state(self) -> dict[str, int]:
        """Return how much has been recorded, for `go_back`; by then it is on the disk."""
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
        self.steps, self.skipped = state["steps"], state["skipped"]
        if self.path is None:
            return
        for name in LINES:
            size = (self.path / name).stat().st_size if (self.path / name).exists() else 0
            if not 0 <= state[name] <= size:
                raise ValueError(f"{name} has {size} bytes, not {state[name]}")
        for name in LINES:
            with (self.path / name).open("ab") as file:
                file.truncate(state[name])
        (self.path / "result.json").unlink(missing_ok=True)  # that of an interrupted run, or of fewer epochs

    def write_config(self) -> None:
        """Write `config.json`."""
        self._write("config.json", self.config)

    def step(
        self,
        loss: Tensor | float,
        result: StepResult | None = None,
        *,
        grad_norm: Tensor | float = math.nan,
        loss_scale: Tensor | float = 1.0,
        applied: Tensor | bool = True,
        epoch: int | None = None,
        lr: float = math.nan,
        tokens: int = 0,
    ) -> None:
        """Keep the row of one step.

        Args:
            loss: fp32, shape ().
            result: of the optimizer's step, in place of the three that follow.
            grad_norm: of all gradients, before clipping.
            loss_scale: that the loss was multiplied by.
            applied: whether the weights were updated.
            epoch: by default 1, and one more after each call of `epoch`.
            lr: of this step.
            tokens: that the step trained on, in all processes.
        """
        if result is not None:
            grad_norm, loss_scale, applied = result.grad_norm, result.loss_scale, result.applied
        self.steps += 1
        n = len(self._pending)
        if n == len(self._values):
            device = loss.device if isinstance(loss, Tensor) else None
            kept, self._values = self._values, torch.empty(max(64, 2 * n), 4, device=device)
            self._values[:n] = kept
        values = [torch.as_tensor(v, device=self._values.device) for v in (loss, grad_norm, loss_scale, applied)]
        torch.stack([v.detach().float() for v in values], out=self._values[n])
        self._pending.append({"step": self.steps, "epoch": self._epoch if epoch is None else epoch, "lr": lr})
        self._tokens += tokens
        if self._interval and self.steps % self._interval == 0:
            self.flush()
            self.end_interval()

    def flush(self) -> list[dict[str, Any]]:
        """Fetch the steps since the last call from the device, append them to `steps.jsonl`, and return their rows."""
        if not self._pending:
            return []
        values = self._values[: len(self._pending)]
        values[:, 0] = self._average(values[:, 0])  # the rest is the same in every process
        rows = []
        for row, (loss, grad_norm, loss_scale, applied) in zip(self._pending, values.tolist(), strict=True):
            rows.append(
                {
                    "step": row["step"],
                    "epoch": row["epoch"],
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "loss_scale": loss_scale,
                    "applied": applied == 1.0,
                    "lr": row["lr"],
                }
            )
        self._pending.clear()
        self.skipped += sum(not row["applied"] for row in rows)
        self._append("steps.jsonl", rows)
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
        row = self._meter.end() | more
        if self.path is not None:
            for listener in self._listeners:
                listener.interval(row)

    def epoch(
        self, valid_loss: float, *, epoch: int | None = None, lr: float = math.nan, seconds: float | None = None
    ) -> None:
        """Append a row to `epochs.jsonl`.

        Args:
            valid_loss: mean over the validation data.
            epoch: by default 1, and one more after each call.
            lr: of the steps of the epoch.
            seconds: that training and validation took; by default, since the last call.
        """
        if self._interval:
            self.flush()
            self.end_interval()
        now = time.monotonic()
        row: dict[str, Any] = {"epoch": self._epoch if epoch is None else epoch}
        row |= losses(valid_loss, self._derived, "valid_")
        row |= {"lr": lr, "seconds": now - self._epoch_start if seconds is None else seconds}
        self._append("epochs.jsonl", [row])
        if self.path is not None:
            for listener in self._listeners:
                listener.epoch(row | {"step": self.steps})
        self._epoch, self._epoch_start = row["epoch"] + 1, now
        self.begin_interval()

    def finish(self, test_loss: float | None = None, **figures: Any) -> None:
        """Record that the run has come to its end, with its loss on the test data and other figures."""
        self.flush()
        self.end_interval()
        self.write_result("finished", test_loss, **figures)

    def write_result(self, status: str, test_loss: float | None, **figures: Any) -> None:
        """Write `result.json`; `status` is "finished", "interrupted" or "diverged"."""
        row: dict[str, Any] = {"status": status} | losses(test_loss, self._derived, "test_")
        row |= {"steps": self.steps, "skipped": self.skipped} | figures
        if self.path is not None:
            for listener in self._listeners:
                listener.result(row)
        self._write("result.json", row)  # last: a disk that is full hides the result from nobody
        self.ended = True

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.path is None:
            return
        with naming(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(to_json(row) + "\n" for row in rows)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.path is None:
            return
        text = to_json(content, indent=2) + "\n"
        write_atomically(self.path / name, lambda file: file.write(text.encode()))


@contextmanager
def _clear_errors(where: str, cannot: str, advice: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise UsageError(f"{where} is in use by another run; wait for its end, or give another directory") from None
    except OSError as error:
        raise UsageError(f"{where}: cannot {cannot} ({error.strerror}); {advice}") from None


def _new_directory(name: str) -> Path:
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for n in range(1, 1000):
        path = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UsageError(f"{base} and 999 like it exist already; give --run-dir")
