"""The description of a run in `config.json`: its options, and what they came to."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.options.modes import mode_of
from lm.options.options import Options, as_values
from roundoff import processes
from roundoff.runs.config_file import describe_device, versions

JOB = (
    *("model", "emsize", "nhid", "nlayers", "nhead", "dropout", "tied"),
    *("batch_size", "bptt", "optimizer", "lr", "clip", "epochs", "max_steps", "dry_run"),
)
"""Options that must be equal where two runs train the same job."""
LENGTH = ("epochs", "max_steps", "dry_run")
"""Those of them that say how long training goes, and change no step; a cosine depends on them."""


def describe(args: Options, corpus: Corpus, model: RNNModel, dtypes: dict[str, str]) -> dict[str, Any]:
    """Return what config.json says: the job, the precision, the seed, the environment, and every option."""
    mode = mode_of(args)
    several = processes.world_size() > 1  # each on a GPU of its own
    return {
        "corpus": corpus.name,
        "job": {"corpus": corpus_facts(corpus), **{name: getattr(args, name) for name in JOB}, **_schedule(args)},
        "precision": {
            "mode": mode.name,
            "dtype": args.dtype,
            "loss_scale": args.loss_scale,
            "dtypes": dtypes,
            "equals": list(mode.equals),
            **_settings(args),
        },
        "seed": args.seed,
        "loss_unit": "nats a word",
        "length": [] if args.lr_schedule == "cosine" else list(LENGTH),
        "environment": environment([*(Path(word).name for word in sys.argv[:1]), *sys.argv[1:]])
        | describe_device(args.device)
        | {"processes": processes.world_size(), "deterministic": args.deterministic, "accumulate": args.accumulate},
        "options": as_values(args) | ({"device": args.device.partition(":")[0]} if several else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _schedule(args: Options) -> dict[str, Any]:
    """Return what of the schedule differs from the default, so that older runs, which say nothing of it, compare."""
    found = {"lr_schedule": (args.lr_schedule, "anneal"), "warmup": (args.warmup, 0)}
    return {name: value for name, (value, default) in found.items() if value != default}


def _settings(args: Options) -> dict[str, Any]:
    """Return what else decides a mode's numbers: how its loss scale moves, apex's opt level, whose fp16_utils runs."""
    found: dict[str, Any] = {}
    if args.loss_scale is None:
        found |= {"init_scale": args.init_scale, "scale_window": args.scale_window}
    if args.opt_level is not None:
        found["opt_level"] = args.opt_level
    if args.script == "main_fp16_optimizer":
        found["fp16_utils"] = args.fp16_utils
    return found


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """Return the digests and the sizes of a corpus. Its name does not count: the same text may lie elsewhere."""
    return {
        "sha256": corpus.sha256,
        "train_tokens": len(corpus.train),
        "valid_tokens": len(corpus.valid),
        "test_tokens": len(corpus.test),
        "words": len(corpus.dictionary),
        "vocab_size": corpus.vocab_size,
    }


def environment(command: list[str]) -> dict[str, Any]:
    """Return versions and system, this project's git commit where it runs from a checkout, and `command`.

    `command` is what the user ran: the script's name and its words.
    """
    return versions() | {"git_commit": git_commit(), "command": command}


def git_commit() -> str | None:
    """Return the commit of this checkout; None where this is no checkout, or git does not say."""
    here = Path(__file__).resolve().parent.parent.parent
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
