"""The start of a run: a new one in a directory of its own, or one that goes on where its checkpoint left it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.model.model_file import load_model, save_model
from lm.options.options import Options
from lm.options.resolve import event_files
from lm.training import distributed
from lm.training.checkpoint import (
    Position,
    check_like,
    check_not_of_the_run,
    has_options,
    moved,
    processes_of,
    read_checkpoint,
    status_of,
)
from lm.training.train_state import TrainState, restore_state
from roundoff import processes
from roundoff.errors import UsageError, printable
from roundoff.precision import Precision
from roundoff.runs.directory import START, Names, RunDirectory
from roundoff.runs.files import check_writable
from roundoff.runs.reading import perplexity
from roundoff.terminal import Terminal, say


class NothingToDoError(Exception):
    """Says why a run to resume stays as it is."""


def start_run(
    args: Options, corpus: Corpus, model: RNNModel, precision: Precision, config: dict[str, Any]
) -> tuple[RunDirectory, TrainState]:
    """Return the open directory of a run, and the state in which the run starts.

    With --resume, put `model`, `precision` and the random generators into the state of the checkpoint.

    Args:
        args: the options.
        corpus: that the run trains on.
        model: with the weights of a new run.
        precision: of a new run.
        config: what `config.json` says from now on.

    Raises:
        UsageError: a place for the results cannot be written, or the run cannot be resumed; it is as it was then.
        NothingToDoError: the run to resume has come to its end.
    """
    _check_places(args)
    records = RunDirectory(
        args.run_dir,
        config=config,
        name=config["precision"]["mode"],
        resume=args.resume is not None,
        listeners=[Terminal(args.log_interval), *([event_files()] if args.tensorboard else [])],
        derived={"ppl": perplexity},
        average=distributed.mean,
        interval=None,
        names=Names("--run-dir ", "--resume ", "--resume "),
    )
    start = None
    if args.resume is not None:
        start = _go_on(args, corpus, model, precision, records, args.resume)
    records.start()
    return records, start or TrainState(Position(lr=args.lr))


def _check_places(args: Options) -> None:
    """Raise UsageError unless --save and --onnx-export can be written."""
    if processes.rank() > 0:
        return
    for flag, path in {"--save": args.save, "--onnx-export": args.onnx_export}.items():
        if path is not None:
            check_not_of_the_run(flag, path, args.run_dir)
            if args.run_dir is None or args.run_dir != path.parent:  # that directory is made, and tried, next
                check_writable(flag, path, make_folder=True)


def _go_on(
    args: Options, corpus: Corpus, model: RNNModel, precision: Precision, records: RunDirectory, directory: Path
) -> TrainState | None:
    """Return the state of the checkpoint in `directory`; None where there is none yet."""
    with _clear_errors(directory, records):
        if status_of(directory) == "diverged":
            raise ValueError("this run has diverged, and would again")
        with distributed.rank_0_first():  # it mends what it finds damaged
            content = read_checkpoint(directory)
        start = None if content is None else _restore(args, corpus, model, precision, content)
        steps = 0 if content is None else content["records"]["steps"]
        end = None if start is None else start.position.end(args, steps)
        has_ended = end is not None and status_of(directory) == "finished"
        if start is not None and end is not None and has_ended:
            _check_anything_is_left(args, corpus, start, directory, end)
        records.go_back(START if content is None else content["records"])
        if start is not None and start.best_weights is not None and processes.rank() == 0:
            _save_best(args, corpus, model, start.best_weights)
        elsewhere = "" if has_ended else moved(directory, records.config)
        same = has_options(directory, records.config["options"]) and processes_of(directory) == processes.world_size()
        if not has_ended and (elsewhere or not same):  # else no step is taken by what is so now
            records.write_config()
    epoch = 1 if start is None else start.position.epoch
    say(f"| going on with {directory} at epoch {epoch}, step {records.steps + 1}")
    if elsewhere:
        say(f"| {elsewhere}: its bits may be others from here on than those of a run that stayed where it was")
    return start


def _check_anything_is_left(args: Options, corpus: Corpus, start: TrainState, directory: Path, end: str) -> None:
    """Raise NothingToDoError where the best model of the finished run is at --save, and no other file is asked for."""
    best = start.best_weights
    there = args.onnx_export is None and best is not None and _is_saved(args.save, best, corpus)
    if distributed.broadcast(float(there)):
        fixed = end == "--dry-run" or args.lr_schedule == "cosine"
        advice = "start a new run" if fixed else "give more"
        raise NothingToDoError(f"the run in {directory} has come to the end that {end} sets; to go on, {advice}")


def _is_saved(path: Path, weights: dict[str, Tensor], corpus: Corpus) -> bool:
    """Return whether the model file at `path` has these weights and the words of `corpus`."""
    try:
        saved, words = load_model(path)
    except (UsageError, OSError):
        return False
    found = saved.state_dict()
    same = found.keys() == weights.keys() and all(torch.equal(found[n], w.float()) for n, w in weights.items())
    return same and words == corpus.dictionary.idx2word


@contextmanager
def _clear_errors(directory: Path, records: RunDirectory) -> Iterator[None]:
    """Close `records` if the block fails, and say in one line why the run in `directory` cannot go on."""
    try:
        yield
    except BaseException as error:
        records.close()
        if isinstance(error, ValueError):
            raise UsageError(f"--resume {directory}: {printable(error)}; start a new run") from None
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UsageError(
                f"--resume {directory}: cannot write {error.filename or 'standard output'} ({error.strerror}); "
                "make that possible, then resume again"
            ) from None
        raise


def _restore(
    args: Options, corpus: Corpus, model: RNNModel, precision: Precision, content: dict[str, Any]
) -> TrainState:
    """Put back what a checkpoint holds; raise ValueError where it is not of this run."""
    if content.get("corpus") != corpus.sha256:
        raise ValueError("its corpus was another one")
    start = restore_state(content, model, precision, args.batch_size)
    check_like(content.get("records"), START, "records")
    if any(type(count) is not int or count < 0 for count in content["records"].values()):
        raise ValueError("its records are not counted in whole numbers")
    epoch = start.position.epoch
    if epoch > args.epochs + 1:
        raise ValueError(f"it has trained for {epoch - 1} epochs already, and --epochs is {args.epochs}")
    steps = content["records"]["steps"]
    if args.max_steps is not None and steps > args.max_steps:
        raise ValueError(f"it has taken {steps} steps already, and --max-steps is {args.max_steps}")
    return start


def _save_best(args: Options, corpus: Corpus, model: RNNModel, weights: dict[str, Tensor]) -> None:
    """Write the best model to --save. The file there may have been lost, or be of a later epoch or another run."""
    current = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    save_model(args.save, model, corpus.dictionary.idx2word)
    model.load_state_dict(current)
