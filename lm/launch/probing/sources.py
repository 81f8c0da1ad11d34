"""Find the weights to be probed (fresh ones, a model file's or a run's) and the options that belong to them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lm.data.corpus import Corpus
from lm.launch.probing.mode import Precisions
from lm.model.language_model import RNNModel
from lm.model.model_file import load_model
from lm.options.command_line import make_parser, read_command_line
from lm.options.config import merge, stored_options
from lm.options.options import SCRIPTS, Options, as_values, checked, flag, options_of
from lm.training.build import make_model
from lm.training.checkpoint import FILE, FORMAT
from lm.training.process import set_up
from lm.training.train_state import restore_state
from roundoff.errors import BadFileError, UsageError, printable
from roundoff.runs.jsonfile import read_object
from roundoff.runs.tensor_file import load_tensors

OF_MODEL = ("model", "emsize", "nhid", "nlayers", "nhead", "dropout", "tied")
OF_SCALE = ("static_loss_scale", "init_scale")
OF_JOB = ("batch_size", "bptt", *OF_MODEL, "optimizer", "lr", "clip", "seed")
REFUSED = {
    **dict.fromkeys(("fp16", "dtype", "dynamic_loss_scale"), "--modes says that"),
    **dict.fromkeys(
        ("cuda", "accel", "device", "tf32"), "a probe runs on the CPU, where dropout is alike in all dtypes"
    ),
    "data": "give --data to probe.py itself",
    "resume": "give --run to probe.py itself",
}


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
    options = _read(argv, ())
    args = merge("main", options)
    set_up(args)
    corpus = Corpus(data)
    return Source(args, options, data, corpus, make_model(args, corpus.vocab_size), _weights("fresh"))


def from_checkpoint(path: Path, data: str, argv: list[str]) -> Source:
    """Return the weights in a model file.

    Raises:
        UsageError: the file is none, or was trained on another vocabulary.
    """
    options = _read(argv, OF_MODEL)
    set_up(merge("main", options))
    model, vocabulary = load_model(path)
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
    given = _read(argv, ()) if argv else {}
    for name in given:
        if name != "init_scale":  # of a mode beside the run's own
            raise UsageError(f"{flag(name)} after -- with --run: the flags are those of the run; leave it out")
    args = replace(_options_of(run), **given)
    set_up(args)
    data = args.data if data is None else data
    corpus = Corpus(data)
    content = _checkpoint(run)
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
    args = replace(args, lr=at.lr)
    return Source(args, job_options(as_values(args)), data, corpus, model, _weights("run", run, at.epoch, steps))


def job_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's `options` that every trainer takes: the job, and the loss scales that were asked for."""
    scales = [name for name in OF_SCALE if options.get(name) != options_of("main")[name].default]
    return checked("main", {name: options[name] for name in (*OF_JOB, *scales) if name in options})


def _weights(kind: str, path: Path | None = None, epoch: int | None = None, steps: int | None = None) -> dict[str, Any]:
    return {"kind": kind, "path": None if path is None else str(path), "epoch": epoch, "steps": steps}


def _copy(masters: list[Any], model: RNNModel) -> None:
    for master, p in zip(masters, model.parameters(), strict=True):
        if not bool(master.isfinite().all()):
            raise ValueError("its weights are not finite; take an earlier checkpoint")
        p.data.copy_(master.detach().view_as(p))


def _read(argv: list[str], fixed: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of the trainers in `argv`, of which none may be what a probe or the model decides."""
    given = read_command_line(make_parser(None, None), None, argv)
    for name in given:
        if name in REFUSED:
            raise UsageError(f"{flag(name)} after --: {REFUSED[name]}; leave it out")
        if name in fixed:
            raise UsageError(f"{flag(name)} after -- with --checkpoint: the model is that of the file; leave it out")
        if name not in options_of("main"):
            raise UsageError(f"{flag(name)} after --: not every trainer has this option; leave it out")
    return given


def _options_of(run: Path) -> Options:
    """Return the options of a run, as of one on the CPU."""
    try:
        if not run.is_dir():
            what = "this is no directory" if run.exists() else "there is no such directory"
            raise UsageError(f"{what}; give one that a trainer's --run-dir wrote")
        options = read_object(run / "config.json").get("options")
        script = options.get("script") if isinstance(options, dict) else None
        if script not in SCRIPTS:
            raise UsageError("config.json names no trainer; give a directory that a trainer's --run-dir wrote")
        stored = stored_options(run, script)
    except OSError as error:
        raise UsageError(f"--run {printable(run)}: cannot read config.json ({error.strerror})") from None
    except UsageError as error:
        raise UsageError(f"--run {printable(run)}: {str(error).removeprefix(f'--resume {printable(run)}: ')}") from None
    return merge(
        script,
        {
            name: stored[name]
            for name in (*OF_JOB, *OF_SCALE, "fp16", "dtype", "dynamic_loss_scale", "data")
            if name in stored
        },
    )


def _checkpoint(run: Path) -> dict[str, Any]:
    path = run / FILE
    if not path.exists():
        raise UsageError(f"--run {printable(run)} has no {FILE}, which is written after the first epoch; wait for it")
    try:
        content = load_tensors(path, FORMAT)
    except (BadFileError, FileNotFoundError) as error:
        raise UsageError(f"--run {printable(run)}: {FILE} cannot be used ({error}); give another run") from None
    if not isinstance(content, dict):
        raise UsageError(f"--run {printable(run)}: {FILE} holds no state of a run; give another run")
    return content
