"""The flags of the trainers that a probe takes after --, and which it refuses. This module imports no torch."""

from collections.abc import Mapping
from typing import Any

from lm.options.command_line import make_parser, read_command_line
from lm.options.options import checked, flag, options_of
from roundoff.errors import UsageError

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


def job_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's `options` that every trainer takes: the job, and the loss scales that were asked for."""
    scales = [name for name in OF_SCALE if options.get(name) != options_of("main")[name].default]
    return checked("main", {name: options[name] for name in (*OF_JOB, *scales) if name in options})


def read_flags(argv: list[str], fixed: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of the trainers in `argv`, of which none may be what a probe or the model decides.

    `fixed` are the options that the model decides.

    Raises:
        UsageError: one of them is, or is no option of every trainer.
    """
    given = read_command_line(make_parser(None, None), None, argv)
    for name in given:
        if name in REFUSED:
            raise UsageError(f"{flag(name)} after --: {REFUSED[name]}; leave it out")
        if name in fixed:
            raise UsageError(f"{flag(name)} after -- with --checkpoint: the model is that of the file; leave it out")
        if name not in options_of("main"):
            raise UsageError(f"{flag(name)} after --: not every trainer has this option; leave it out")
    return given
