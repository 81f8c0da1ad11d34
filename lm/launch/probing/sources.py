"""Find the weights to be probed (fresh ones, a model file's or a run's) and the options that belong to them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lm.data.corpora import DEFAULT
from lm.data.corpus import Corpus
from lm.launch.best_model import checkpoint_of_run, load_best, options_of_run
from lm.launch.probing.flags import OF_MODEL, job_options, read_flags
from lm.launch.probing.mode import Precisions
from lm.model.language_model import RNNModel
from lm.options.config import merge
from lm.options.options import Options, as_values, flag
from lm.training.build import make_model
from lm.training.process import set_up
from lm.training.schedule import batches_of_epoch, rate_of_step
from lm.training.train_state import restore_state
from roundoff.errors import UsageError, printable


@dataclass(frozen=True)
class Source:
    """Holds all that one probe is about.

    Attributes:
        args: of a trainer that would train `model`.
        options: of every mode's trainer, checked.
        data: what --data named.
        corpus: its training text is read.
        model: fp32, on the CPU.
        weights: as in probe.json.
    """

    args: Options
    options: dict[str, Any]
    data: str
    corpus: Corpus
    model: RNNModel
    weights: dict[str, Any]


def fresh(data: str, argv: list[str]) -> Source:
    """Return the weights that a trainer with the flags `argv` starts from."""
    options = read_flags(argv, ())
    args = merge("main", options)
    set_up(args)
    corpus = Corpus(data)
    return Source(args, options, data, corpus, make_model(args, corpus.vocab_size), _weights("fresh"))


def from_checkpoint(path: Path, data: str | None, argv: list[str]) -> Source:
    """Return the weights in a model file, or those of the best model of a run.

    Args:
        path: the file, or a run directory.
        data: the corpus; None for that of the run, or for the default one.
        argv: flags of the trainers.

    Raises:
        UsageError: there is no such model, or it was trained on another vocabulary.
    """
    options = read_flags(argv, OF_MODEL)
    set_up(merge("main", options))
    model, vocabulary = load_best(path)
    if data is None:
        data = options_of_run("--checkpoint", path).data if path.is_dir() else DEFAULT
    options["model"] = model.options["kind"]  # whose learning rate is the default
    corpus = Corpus(data)
    if corpus.dictionary.idx2word != vocabulary:
        raise UsageError(
            f"--checkpoint {path} has {len(vocabulary)} words, which are not the {len(corpus.dictionary)} of "
            f"--data {data}; give the corpus that it was trained on"
        )
    return Source(merge("main", options), options, data, corpus, model, _weights("checkpoint", path))


def from_run(run: Path, data: str | None, argv: list[str], precisions: Precisions) -> Source:
    """Return the fp32 weights at the last checkpoint of a run, with the run's options.

    Args:
        run: a run directory.
        data: the corpus; None for that of the run.
        argv: flags of the trainers; there may be none but --init-scale, for the modes with a dynamic loss scale.
        precisions: every trainer's `make_precision`.

    Raises:
        UsageError: the run holds no weights that can be used, or flags are given too.
    """
    given = read_flags(argv, ()) if argv else {}
    for name in given:
        if name != "init_scale":  # of a mode beside the run's own
            raise UsageError(f"{flag(name)} after -- with --run: the flags are those of the run; leave it out")
    args = replace(options_of_run("--run", run), **given)
    set_up(args)
    data = args.data if data is None else data
    corpus = Corpus(data)
    content = checkpoint_of_run("--run", run)
    model = make_model(args, corpus.vocab_size)
    half = make_model(args, corpus.vocab_size)
    precision = precisions[args.script](args, half)
    try:
        if content.get("corpus") != corpus.sha256:
            raise ValueError("its corpus was another one; give that with --data")
        with torch.random.fork_rng(devices=[]):
            at, _, _ = restore_state(content, half, precision, args.batch_size)
        steps = content["records"]["steps"]
        if type(steps) is not int or not 0 <= steps < 2**63:
            raise ValueError("its records are not counted in whole numbers")
        masters = [p for group in precision.param_groups for p in group["params"]]
        _copy(masters, model)
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"--run {run}: {printable(error)}") from None
    rate = rate_of_step(args, at.lr, steps, batches_of_epoch(args, len(corpus.train)))
    args = replace(args, lr=rate)
    return Source(args, job_options(as_values(args)), data, corpus, model, _weights("run", run, at.epoch, steps))


def _weights(kind: str, path: Path | None = None, epoch: int | None = None, steps: int | None = None) -> dict[str, Any]:
    return {"kind": kind, "path": None if path is None else str(path), "epoch": epoch, "steps": steps}


def _copy(masters: list[Any], model: RNNModel) -> None:
    for master, p in zip(masters, model.parameters(), strict=True):
        if not bool(master.isfinite().all()):
            raise ValueError("its weights are not finite; take an earlier checkpoint")
        p.data.copy_(master.detach().view_as(p))
