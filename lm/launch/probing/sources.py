"""Where the weights to be probed come from: fresh ones, a model file, or a run; and the flags that belong to them."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lm.data.corpus import Corpus
from lm.launch.probing.build import build
from lm.model.language_model import RNNModel, make_model
from lm.model.model_file import load_model
from lm.options.command_line import expand
from lm.options.config import SCRIPTS, parse_args, set_up
from lm.options.options import make_parser
from lm.training.checkpoint import FILE, FORMAT, command_of
from lm.training.train_state import restore_state
from roundoff.cli import as_flags
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
    """What is probed.

    Attributes:
        args: of a trainer that would train it.
        flags: of every mode's trainer.
        data, corpus: whose training text is read; `data` is what --data named.
        model: fp32, on the CPU.
        weights: as in probe.json.
    """

    args: argparse.Namespace
    flags: list[str]
    data: str
    corpus: Corpus
    model: RNNModel
    weights: dict[str, Any]


def fresh(data: str, flags: list[str]) -> Source:
    """The weights that a trainer with these flags starts from."""
    args = _read(flags, ())
    set_up(args)
    corpus = Corpus(data)
    return Source(args, flags, data, corpus, make_model(args, corpus.vocab_size), _weights("fresh"))


def from_checkpoint(path: Path, data: str, flags: list[str]) -> Source:
    """The weights in a model file.

    Raises:
        UsageError: it is none, or was trained on another vocabulary.
    """
    args = _read(flags, OF_MODEL)
    set_up(args)
    model, vocabulary = load_model(path)
    flags = [*flags, "--model", model.options["kind"]]
    args = parse_args("main", None, flags)  # whose learning rate is that of the model
    corpus = Corpus(data)
    if corpus.dictionary.idx2word != vocabulary:
        raise UsageError(
            f"--checkpoint {path} has {len(vocabulary)} words, which are not the {len(corpus.dictionary)} of "
            f"--data {data}; give the corpus that it was trained on"
        )
    return Source(args, flags, data, corpus, model, _weights("checkpoint", path))


def from_run(run: Path, data: str | None, flags: list[str]) -> Source:
    """The fp32 weights at the last checkpoint of a run, with its flags and its corpus, or that in `data`.

    Raises:
        UsageError: it holds none that can be used, or flags are given too.
    """
    if flags:
        raise UsageError(f"{flags[0]} after -- with --run: the flags are those of the run; leave it out")
    script, theirs = _command(run)
    args = parse_args(script, None, theirs)
    set_up(args)
    data = args.data if data is None else data
    corpus = Corpus(data)
    content = _checkpoint(run)
    model = make_model(args, corpus.vocab_size)
    half = make_model(args, corpus.vocab_size)
    precision = build(args, half)
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
    args.lr = at.lr
    options = make_parser("main", None).options()
    common = as_flags(options, {name: getattr(args, name) for name in OF_JOB} | loss_scales(script, theirs))
    return Source(args, common, data, corpus, model, _weights("run", run, at.epoch, steps))


def loss_scales(script: str, flags: list[str]) -> dict[str, float]:
    """Those that `flags` of a trainer ask for, by the names of the options."""
    parser = make_parser(script, None)
    args, default = parser.parse_args(flags), parser.get_default
    return {name: getattr(args, name) for name in OF_SCALE if getattr(args, name, default(name)) != default(name)}


def _weights(kind: str, path: Path | None = None, epoch: int | None = None, steps: int | None = None) -> dict[str, Any]:
    return {"kind": kind, "path": None if path is None else str(path), "epoch": epoch, "steps": steps}


def _copy(masters: list[Any], model: RNNModel) -> None:
    for master, p in zip(masters, model.parameters(), strict=True):
        if not bool(master.isfinite().all()):
            raise ValueError("its weights are not finite; take an earlier checkpoint")
        p.data.copy_(master.detach().view_as(p))


def _read(flags: list[str], fixed: tuple[str, ...]) -> argparse.Namespace:
    """Flags of the trainers, without those that a probe or the model decides."""
    parser = make_parser("main", None)
    options = parser.options()
    spelt = {word: name for name, action in options.items() for word in action.option_strings}
    spelt |= {"--dtype": "dtype", "--dynamic-loss-scale": "dynamic_loss_scale"}

    def refuse(words: list[str]) -> None:
        for word in words:
            name = spelt.get(word.partition("=")[0], "")
            if name in REFUSED:
                raise UsageError(f"{printable(word)} after --: {REFUSED[name]}; leave it out")
            if name in fixed:
                raise UsageError(
                    f"{printable(word)} after -- with --checkpoint: the model is that of the file; leave it out"
                )

    refuse(flags)
    refuse(expand(parser, flags))
    return parse_args("main", None, flags)


def _command(run: Path) -> tuple[str, list[str]]:
    """Script and flags of a run, on the CPU."""
    try:
        if not run.is_dir():
            what = "this is no directory" if run.exists() else "there is no such directory"
            raise UsageError(f"{what}; give one that a trainer's --run-dir wrote")
        script = read_object(run / "config.json").get("script")
        if script not in SCRIPTS:
            raise UsageError("config.json names no trainer; give a directory that a trainer's --run-dir wrote")
        flags = command_of(run, script)
    except OSError as error:
        raise UsageError(f"--run {printable(run)}: cannot read config.json ({error.strerror})") from None
    except UsageError as error:
        raise UsageError(f"--run {printable(run)}: {str(error).removeprefix(f'--resume {printable(run)}: ')}") from None
    parser = make_parser(script, None)
    args = parser.parse_args(flags)
    ours = (*OF_JOB, *OF_SCALE, "use_optimizer", "data", "fp16", "dtype", "dynamic_loss_scale")
    names = [name for name in parser.options() if name in ours]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return script, as_flags(parser.options(), values)


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
