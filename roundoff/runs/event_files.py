"""Event files of a run, in its own directory: `tensorboard --logdir runs` lays all runs over each other.

Import this module only where TensorBoard is asked for.
"""

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import hparams

from roundoff.runs.files import naming, sync
from roundoff.runs.meter import curves

VERSION = "brain.Event:2"  # the format whose readers heed SessionLog.START


class EventFiles:
    """A listener that appends to one file for each time that the run starts or goes on.

    Scalars are `train/<name>` once an interval, `valid/<name>` once an epoch and `test/<name>` at the end, all by
    step and in fp32, which is what the format holds. The hyperparameters come last: job, precision and seed, with
    the last figure of the test as their metric. Every event is on the disk before the next step, so a checkpoint is
    never ahead of the curves. SummaryWriter would write from a thread, whose traceback nobody wants to see on a full
    disk.
    """

    def __init__(self) -> None:
        self.path = Path()
        self.config: dict[str, Any] = {}

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        """Begin a file, and hide what earlier files say of the steps after `step`, which are trained again."""
        count = len(list(directory.glob("events.out.tfevents.*")))
        self.path = directory / f"events.out.tfevents.{count:06}"  # readers take them in the order of their names
        self.config = config
        self._write(file_version=VERSION)
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def interval(self, row: dict[str, Any]) -> None:
        """Write the training."""
        self._scalars("train", curves(row), row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Write the validation."""
        self._scalars("valid", _part(row, "valid_"), row["step"])

    def result(self, row: dict[str, Any]) -> None:
        """Write the test and the hyperparameters."""
        step, metrics = row["steps"], {}
        if row["test_loss"] is not None:
            values = _part(row, "test_")
            self._scalars("test", values, step)
            metrics = {f"test/{name}": value for name, value in list(values.items())[-1:]}
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


def _part(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _choices(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Return what TensorBoard can show of job, precision and the top of config.json: plain values."""
    values = {**config["job"], **config["precision"], **config}
    values.pop("loss_unit", None)  # the losses', and nobody chose it
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
