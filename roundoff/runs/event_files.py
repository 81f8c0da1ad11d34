"""A run as event files in its own directory: `tensorboard --logdir runs` lays all runs over each other.

Imported only where --tensorboard asks for it.
"""

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import hparams

from roundoff.runs.files import naming, sync

VERSION = "brain.Event:2"  # the format whose readers heed SessionLog.START
NOT_HPARAMS = ("device_name", "parameters", "log_interval", "checkpoint_interval", "tensorboard")
"""What `config.json` says beside the choices that make a run what it is."""


class EventFiles:
    """A Listener that appends to one file for each time that the run starts or goes on.

    Scalars are `train/<name>` once a log interval, `valid/<name>` once an epoch and `test/<name>` at the end, all by
    step and in fp32, which is what the format holds; the hyperparameters come last, with `test/ppl` as their metric.
    Every event is on the disk before the next step, so a checkpoint is never ahead of the curves. SummaryWriter
    would write from a thread, whose traceback nobody wants to see on a full disk.
    """

    def __init__(self) -> None:
        self.path = Path()
        self.config: dict[str, Any] = {}

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        """Begin a file, and hide what earlier ones say of the steps after `step`, which are trained again."""
        count = len(list(directory.glob("events.out.tfevents.*")))
        self.path = directory / f"events.out.tfevents.{count:06}"  # readers take them in the order of their names
        self.config = config
        self._write(file_version=VERSION)
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def interval(self, row: dict[str, Any]) -> None:
        """Write the training."""
        values = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        self._scalars("train", values, row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Write the validation."""
        self._scalars("valid", {"loss": row["valid_loss"], "ppl": row["valid_ppl"]}, row["step"])

    def result(self, row: dict[str, Any]) -> None:
        """Write the test and the hyperparameters."""
        step, metrics = row["steps"], {}
        if row["test_ppl"] is not None:
            self._scalars("test", {"loss": row["test_loss"], "ppl": row["test_ppl"]}, step)
            metrics = {"test/ppl": row["test_ppl"]}
        experiment, start, end = hparams(_choices(self.config), metrics)  # type: ignore[no-untyped-call]
        for summary in (experiment, start, end) if row["status"] == "finished" else (experiment, start):
            self._write(step=step, summary=summary)

    def _scalars(self, part: str, values: dict[str, float], step: int) -> None:
        scalars = [Summary.Value(tag=f"{part}/{name}", simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def _write(self, **content: Any) -> None:
        event = Event(wall_time=time.time(), **content)
        with naming(self.path), self.path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())
            sync(file)


def _choices(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Those entries of `config.json` that were chosen and that TensorBoard can show: no places, and no None."""
    kept = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
    return {name: value for name, value in kept.items() if name not in NOT_HPARAMS} | {
        "corpus": config["job"]["corpus"]["name"]
    }
