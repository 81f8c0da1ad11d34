"""How a run is taken up again where its checkpoint left it."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.training import distributed
from lm.training.checkpoint import check_like, has_options, moved, processes_of, read_checkpoint, status_of
from lm.training.train_state import restore_state
from roundoff import processes
from roundoff.errors import UsageError, printable
from roundoff.runs.directory import START, RunDirectory
from roundoff.terminal import say

if TYPE_CHECKING:
    from lm.training.loop import Training


def go_on(training: "Training", directory: Path, config: dict[str, Any], writes: bool) -> None:
    """Let `training` go on from the checkpoint of --resume, or from the beginning where there is none yet.

    `config` is what `config.json` says from now on, if flags or machine are others than the run had; `writes` whether
    this process keeps the records.

    Raises:
        UsageError: the run cannot be resumed; it is as it was then.
    """
    training.records = (
        RunDirectory.reopen(directory, distributed.mean) if writes else RunDirectory(None, distributed.mean)
    )
    try:
        if status_of(directory) == "diverged":
            raise ValueError("this run has diverged, and would again")
        with distributed.rank_0_first():  # it mends what it finds damaged
            content = read_checkpoint(directory)
        if content is not None:
            _restore(training, content)
        elif writes:
            training.records.go_back(START)
        elsewhere = moved(directory, config)
        if (
            elsewhere
            or not has_options(directory, config["options"])
            or processes_of(directory) != processes.world_size()
        ):
            training.records.write_config(config)
    except BaseException as error:
        training.records.close()
        if isinstance(error, ValueError):
            raise UsageError(f"--resume {directory}: {printable(error)}; start a new run") from None
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UsageError(
                f"--resume {directory}: cannot write {error.filename or 'standard output'} ({error.strerror}); "
                "make that possible, then resume again"
            ) from None
        raise
    say(f"| going on with {directory} at epoch {training.at.epoch}, step {training.records.steps + 1}")
    if elsewhere:
        say(f"| {elsewhere}: its bits may be others from here on than those of a run that stayed where it was")


def _restore(training: "Training", content: dict[str, Any]) -> None:
    """Be where the checkpoint was written; raise ValueError where it is not of this run."""
    if content.get("corpus") != training.corpus.sha256:
        raise ValueError("its corpus was another one")
    training.at, training.hidden, training.best_weights = restore_state(
        content, training.model, training.precision, training.args.batch_size
    )
    check_like(content.get("records"), START, "records")
    if any(type(count) is not int or count < 0 for count in content["records"].values()):
        raise ValueError("its records are not counted in whole numbers")
    if training.at.epoch > training.args.epochs + 1:
        raise ValueError(
            f"it has trained for {training.at.epoch - 1} epochs already, and --epochs is {training.args.epochs}"
        )
    training.records.go_back(content["records"])
    if training.best_weights is not None:  # --save may have been lost since, or be of a later epoch or another run
        current = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(training.best_weights)
        training.save_model()
        training.model.load_state_dict(current)
