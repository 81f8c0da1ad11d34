"""The run directory: everything that is known of a run afterwards, as files that any program can read.

`config.json` is written when training starts, `steps.jsonl` and `epochs.jsonl` grow with it, `result.json` is
written at its end. Whoever trains writes a checkpoint beside them. JSON has no inf or nan: such values stand as the
strings "inf", "-inf" and "nan", which Python's float() and JavaScript's Number() (but for "inf") read back.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from roundoff.errors import UsageError
from roundoff.precision import StepResult
from roundoff.runs.files import lock, naming, remove_leftovers, sync, write_atomically
from roundoff.runs.jsonfile import to_json
from roundoff.runs.listeners import Listener, current_listeners

LINES = ("steps.jsonl", "epochs.jsonl")
FILES = ("config.json", *LINES, "result.json", "checkpoint.safetensors")
START = dict.fromkeys(("steps", "skipped", *LINES), 0)
"""The `RunDirectory.state` of a run that has recorded nothing."""


class RunDirectory:
    """Writes the records of one run into its directory, which nobody else may write to until `close`.

    Steps are kept on the device until `flush` fetches them all with a single wait, in one tensor: as one for each
    number they would lie in the holes that large tensors leave for the next step. `create` and `reopen` make one.

    Args:
        path: of the directory; None writes nothing, for the processes of a run whose rank is not 0.
        average: returns the mean over all processes of each of the losses (fp32, shape (steps,)) that it is given.

    Attributes:
        listeners: hear of all that is recorded from `start` on; see `roundoff.runs.listeners`.
    """

    def __init__(self, path: Path | None, average: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        self.path = path
        self.steps = 0
        self.skipped = 0
        self.listeners: list[Listener] = []
        self._pending: list[dict[str, Any]] = []
        self._values = torch.empty(0, 4)
        self._average = average
        self._lock = None if path is None else lock(path)

    @classmethod
    def create(
        cls,
        path: Path | None,
        name: str,
        config: dict[str, Any],
        average: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Self:
        """The directory of a new run: `path`, which must not hold one yet, or by default `runs/<name>-<time>`.

        `config.json` is its first file: from then on the run can be resumed.

        Raises:
            UsageError: the directory holds a run already or is in use, or cannot be made or written to.
        """
        where = "runs" if path is None else f"--run-dir {path}"
        with _clear_errors(where, "write there", "give another directory"):
            new = path is None or not path.exists()
            path = _new_directory(name) if path is None else path
            path.mkdir(parents=True, exist_ok=True)
            records = cls(path, average)
            try:
                if any(os.path.lexists(path / file) for file in FILES):
                    raise UsageError(
                        f"--run-dir {path} holds a run already; give a new one, or --resume {path} to go on with it"
                    )
                records.write_config(config)
                for file in LINES:
                    (path / file).touch()
            except BaseException:
                if new:
                    with suppress(OSError):
                        path.rmdir()
                records.close()
                raise
        return records

    @classmethod
    def reopen(cls, path: Path, average: Callable[[Tensor], Tensor] = lambda values: values) -> Self:
        """The directory of a run that goes on; `go_back` must follow.

        Raises:
            UsageError: another process is at it, or it cannot be opened.
        """
        where = f"--resume {path}"
        with _clear_errors(where, "open it", "give a run directory"):
            records = cls(path, average)
        for file in FILES:
            remove_leftovers(path / file)
        return records

    def close(self) -> None:
        """Let others write to the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def state(self) -> dict[str, int]:
        """How much has been recorded, for `go_back`; by then it is on the disk."""
        lengths = {}
        for name in LINES:
            lengths[name] = 0
            if self.path is not None:
                with naming(self.path / name), (self.path / name).open("ab") as file:
                    sync(file)
                    lengths[name] = file.tell()
        return {"steps": self.steps, "skipped": self.skipped} | lengths

    def go_back(self, state: dict[str, int]) -> None:
        """Forget what was recorded after `state`, a line that a crash cut in two included.

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

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.json`."""
        self._write("config.json", config)

    def start(self, config: dict[str, Any]) -> None:
        """Tell the listeners that training begins, or goes on from here."""
        if self.path is not None:
            self.listeners = current_listeners(config)
            for listener in self.listeners:
                listener.start(self.path, config, self.steps)

    def step(self, epoch: int, lr: float, loss: Tensor, result: StepResult) -> None:
        """Keep the row of one step; `loss` is fp32 of shape ()."""
        self.steps += 1
        n = len(self._pending)
        if n == len(self._values):
            kept, self._values = self._values, torch.empty(max(64, 2 * n), 4, device=loss.device)
            self._values[:n] = kept
        values = (loss, result.grad_norm, result.loss_scale, result.applied)
        torch.stack([v.detach().float() for v in values], out=self._values[n])
        self._pending.append({"step": self.steps, "epoch": epoch, "lr": lr})

    def flush(self) -> list[dict[str, Any]]:
        """Fetch the steps since the last call from the device, append them to `steps.jsonl`, and return them."""
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
        return rows

    def interval(self, row: dict[str, Any]) -> None:
        """Tell the listeners of the steps since the last call."""
        for listener in self.listeners:
            listener.interval(row)

    def epoch(self, epoch: int, valid_loss: float, lr: float, seconds: float) -> None:
        """Append a row to `epochs.jsonl`; `seconds` covers training and validation."""
        row = {"epoch": epoch, "valid_loss": valid_loss, "valid_ppl": perplexity(valid_loss), "lr": lr}
        row["seconds"] = seconds
        self._append("epochs.jsonl", [row])
        for listener in self.listeners:
            listener.epoch(row | {"step": self.steps})

    def write_result(self, status: str, test_loss: float | None, **figures: Any) -> None:
        """Write `result.json`; `status` is "finished", "interrupted" or "diverged"."""
        test_ppl = None if test_loss is None else perplexity(test_loss)
        counts = {"steps": self.steps, "skipped": self.skipped}
        row = {"status": status, "test_loss": test_loss, "test_ppl": test_ppl} | counts | figures
        self._write("result.json", row)
        for listener in self.listeners:
            listener.result(row)

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


def machine(config: dict[str, Any]) -> dict[str, str]:
    """What decides the bits of a run besides its command: device, torch, and into how many parts sums are cut.

    `config` is what `config.json` holds.
    """
    environment = config["environment"]
    return {
        "device": str(config["device_name"]),
        "torch": str(environment.get("torch")),
        "threads": str(environment.get("threads")),
    }


def perplexity(loss: float) -> float:
    """exp(loss), for a mean cross entropy in nats a word; inf where it exceeds what a float can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
