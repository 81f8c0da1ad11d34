"""The best model of a run, found from its run directory or from the file that --save wrote.

The file may be gone, or be another run's by now: the checkpoint has the weights too, and the corpus has the words.
"""

from pathlib import Path
from typing import Any

import torch

from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.model.model_file import load_model, model_of
from lm.options.config import merge, stored_options
from lm.options.options import SCRIPTS, Options
from lm.training.build import make_model
from lm.training.checkpoint import DAMAGED, FILE, FORMAT, PREVIOUS
from roundoff.errors import BadFileError, UsageError, printable
from roundoff.runs.jsonfile import read_object
from roundoff.runs.tensor_file import load_tensors

OF_RUN = (
    *("model", "emsize", "nhid", "nlayers", "nhead", "dropout", "tied", "batch_size", "bptt", "optimizer", "lr"),
    *("clip", "seed", "static_loss_scale", "init_scale", "fp16", "dtype", "dynamic_loss_scale", "data", "save"),
)
"""The options of a run that say what its model is, and how its gradient comes about."""


def load_best(path: Path) -> tuple[RNNModel, list[str]]:
    """Return the fp32 model on the CPU and its vocabulary: those of a model file, or the best ones of a run directory.

    Raises:
        UsageError: there is no such model.
    """
    if path.name in (FILE, PREVIOUS, DAMAGED) and path.is_file():
        raise UsageError(
            f"--checkpoint {path} is for --resume: it holds the state of a run; for its best model give the run "
            f"directory, --checkpoint {path.parent}"
        )
    return _of_run(path) if path.is_dir() else load_model(path)


def _of_run(run: Path) -> tuple[RNNModel, list[str]]:
    args = options_of_run("--checkpoint", run)
    content = checkpoint_of_run("--checkpoint", run)
    best = content.get("best_weights")
    weights = content.get("model") if best is None else best  # the model so far, before the first validation
    for place in dict.fromkeys((args.save, run / args.save.name)):  # a run directory with its model may be moved
        try:
            model, vocabulary = load_model(place)
        except UsageError:
            continue
        if _same(model, weights):
            return model, vocabulary
    try:
        corpus = Corpus(args.data)
        if content.get("corpus") != corpus.sha256:
            raise UsageError(f"--data {args.data} is another corpus now")
    except UsageError as error:
        raise UsageError(
            f"--checkpoint {printable(run)}: its model is not in {printable(args.save)} any more, and its words are "
            f"only in its corpus ({printable(error, 100)}); bring one of them back"
        ) from None
    try:
        with torch.device("meta"):  # which takes no memory
            options = make_model(args, corpus.vocab_size).options
        return model_of({"options": options, "vocabulary": corpus.dictionary.idx2word, "weights": weights})
    except Exception as error:  # the weights may be anything
        reason = printable(" ".join(str(error).split()), 160)
        raise UsageError(f"--checkpoint {printable(run)}: {FILE} contradicts itself ({reason}); train again") from None


def _same(model: RNNModel, weights: Any) -> bool:
    """Return whether `weights`, of a checkpoint, are those of `model`, rounded to fp32."""
    ours = model.state_dict()
    if not isinstance(weights, dict) or weights.keys() != ours.keys():
        return False
    return all(isinstance(w, torch.Tensor) and torch.equal(w.float(), ours[name]) for name, w in weights.items())


def options_of_run(flag: str, run: Path) -> Options:
    """Return the options of a run, as of one on the CPU.

    Raises:
        UsageError: `run`, which `flag` names, is no run directory.
    """
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
        raise UsageError(f"{flag} {printable(run)}: cannot read config.json ({error.strerror})") from None
    except UsageError as error:
        reason = str(error).removeprefix(f"--resume {printable(run)}: ")
        raise UsageError(f"{flag} {printable(run)}: {reason}") from None
    return merge(script, {name: stored[name] for name in OF_RUN if name in stored})


def checkpoint_of_run(flag: str, run: Path) -> dict[str, Any]:
    """Return the content of a run's last checkpoint.

    Raises:
        UsageError: there is none that can be used.
    """
    path = run / FILE
    if not path.exists():
        raise UsageError(f"{flag} {printable(run)} has no {FILE}, which is written after the first epoch; wait for it")
    try:
        content = load_tensors(path, FORMAT)
    except (BadFileError, FileNotFoundError) as error:
        raise UsageError(f"{flag} {printable(run)}: {FILE} cannot be used ({error}); give another run") from None
    if not isinstance(content, dict):
        raise UsageError(f"{flag} {printable(run)}: {FILE} holds no state of a run; give another run")
    return content
