"""The run directory: everything that is known of a run afterwards, as files that any program can read.

`config.json` is written when training starts, `steps.jsonl` and `epochs.jsonl` grow with it, `result.json` is
written at its end. JSON has no inf or nan: such values stand as the strings "inf", "-inf" and "nan", which
Python's float() and JavaScript's Number() (but for "inf") read back.
"""

import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lm
from lm.checkpoint import write_atomically
from lm.errors import UsageError
from lm.precision import StepResult

FILES = ("config.json", "steps.jsonl", "epochs.jsonl", "result.json")


class RunDirectory:
    """Creates the directory of one run and writes its records.

    Steps are kept as tensors on the device until `flush` fetches them all with a single wait.

    Args:
        path: must not hold a run yet; None gives `runs/<name>-<time>`.
        name: of the run, used where `path` is None.

    Raises:
        UsageError: the directory holds a run already, or cannot be made or written to.
    """

    def __init__(self, path: Path | None, name: str) -> None:
        try:
            self.path = _new_directory(name) if path is None else path
            self.path.mkdir(parents=True, exist_ok=True)
            if any((self.path / file).exists() for file in FILES):
                raise UsageError(f"--run-dir {self.path} holds a run already; give a new directory")
            for file in ("steps.jsonl", "epochs.jsonl"):
                (self.path / file).touch()
        except OSError as error:
            where = "runs" if path is None else f"--run-dir {path}"
            raise UsageError(f"{where}: cannot write there ({error.strerror}); give another directory") from None
        self._pending: list[tuple[dict[str, Any], tuple[Tensor, ...]]] = []
        self.steps = 0
        self.skipped = 0

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.json`."""
        self._write("config.json", config)

    def step(self, epoch: int, lr: float, loss: Tensor, result: StepResult) -> None:
        """Keep the row of one step; `loss` is fp32 of shape ()."""
        self.steps += 1
        row = {"step": self.steps, "epoch": epoch, "lr": lr}
        self._pending.append((row, (loss, result.grad_norm, result.loss_scale, result.applied)))

    def flush(self) -> list[dict[str, Any]]:
        """Fetch the steps since the last call from the device, append them to `steps.jsonl`, and return them."""
        if not self._pending:
            return []
        values = torch.stack([v.detach().float() for _, tensors in self._pending for v in tensors]).tolist()
        rows = []
        for i, (row, tensors) in enumerate(self._pending):
            loss, grad_norm, loss_scale, applied = values[i * len(tensors) : (i + 1) * len(tensors)]
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

    def epoch(self, epoch: int, valid_loss: float, lr: float, seconds: float) -> None:
        """Append a row to `epochs.jsonl`; `seconds` covers training and validation."""
        row = {"epoch": epoch, "valid_loss": valid_loss, "valid_ppl": perplexity(valid_loss), "lr": lr}
        self._append("epochs.jsonl", [row | {"seconds": seconds}])

    def write_result(self, status: str, test_loss: float | None, **figures: Any) -> None:
        """Write `result.json`; `status` is "finished", "interrupted" or "diverged"."""
        test_ppl = None if test_loss is None else perplexity(test_loss)
        counts = {"steps": self.steps, "skipped": self.skipped}
        self._write("result.json", {"status": status, "test_loss": test_loss, "test_ppl": test_ppl} | counts | figures)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(to_json(row) + "\n" for row in rows)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = to_json(content, indent=2) + "\n"
        write_atomically(self.path / name, lambda file: file.write(text.encode()))


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


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; floats keep every bit, and those that JSON lacks become "inf", "-inf" and "nan"."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def perplexity(loss: float) -> float:
    """exp(loss), for a mean cross entropy in nats a word; inf where it exceeds what a float can hold."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def environment() -> dict[str, Any]:
    """Versions of torch, Python and this project, its git commit where it runs from a checkout, and the system."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lm_precision": lm.__version__,
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():  # installed; a repository further up is not this project's
        return None
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(here), "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
