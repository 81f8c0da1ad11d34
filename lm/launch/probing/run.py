"""Make all of probe.json of what is to be probed."""

import math
import time
from collections.abc import Callable
from typing import Any

from lm.data.corpus import batchify
from lm.launch.probing.mode import Mode, Precisions
from lm.launch.probing.reference import Reference
from lm.launch.probing.sources import Source
from lm.options.config import merge
from lm.options.modes import MODES
from lm.training import description
from roundoff.device import peak_memory_bytes
from roundoff.errors import UsageError, printable
from roundoff.gradients import advice
from roundoff.gradients.measure import Measurement, Plan
from roundoff.gradients.result import FORMAT
from roundoff.gradients.statistics import LEAST_BATCHES
from roundoff.terminal import progress_bar

MEASURED_KS = (0, 7, 16)
"""Exponents of the loss scales that are also measured: none, the default static one, and where a dynamic one starts."""

COVERS = [
    "The true gradient is that of the same model and loss in float64, at the fp32 weights, with the same batch, "
    "dropout masks and hidden state. A mode's error so has the rounding of its weights and of the hidden state in it; "
    "that of the weights is the same in every batch, and is bias here, but changes as training moves them.",
    "Half gradients are taken as the trainers' own code leaves them before its step, and divided by the loss scale in "
    "float64. CPU kernels differ between modes, and so do their errors; those of a GPU were not measured.",
    "A tensor of which an element is inf or nan in a mode has no error and no bias there.",
    "Shares are of the elements that are not 0 in the reference (nor under 2**-40 of the tensor's largest). Predicted "
    "ones are of the reference's own values, rounded to fp16 once; measured ones have in them what was flushed further "
    "up on the way back.",
    "Noise, bias and their standard errors come from inner products of sketches, true to about 1%, and from as many "
    "batches as are named here, in the order of the text; other text may differ.",
    "Gradients at one set of weights: errors that add up over steps, and what an optimizer makes of them, are not "
    "seen. Stagnation is of SGD's updates, lr times the clipped gradient.",
]


def run_probe(
    source: Source, names: list[str], batches: int, flush_limit: float, command: list[str], precisions: Precisions
) -> dict[str, Any]:
    """Probe the modes `names`; return all of probe.json.

    Args:
        source: what is probed.
        names: of modes.
        batches: how many, from the start of the training text.
        flush_limit: the share of a gradient that a loss scale that serves may flush.
        command: what the user ran.
        precisions: every trainer's `make_precision`.

    Raises:
        UsageError: the corpus has too few batches, a trainer refuses its options, or this machine cannot run a mode.
    """
    start, args = time.monotonic(), source.args
    modes = [_make_mode(name, source, precisions) for name in names]
    data = batchify(source.corpus.train, args.batch_size, "cpu")
    starts = range(0, len(data) - 1, args.bptt)
    _check_batches(batches, len(starts))
    plan = Plan(
        modes,
        batches,
        args.seed,
        scaled=plan_scales(modes, lambda scale: _make_mode("manual", source, precisions, scale)),
        lr=args.lr if args.optimizer == "sgd" else None,  # AdamW's updates are not a multiple of the gradient
        clip=args.clip,
    )
    reference = Reference(source.model)
    measured = Measurement(reference, plan)
    measured.run(reference.batches(data, progress_bar(starts[:batches], "probe"), args.bptt))
    result = {
        "format": FORMAT,
        "environment": description.environment(command),
        "about": _about(source, batches),
        "job": _job(source),
        "seed": args.seed,
        "batches": batches,
        "lr": args.lr,
        "clip": args.clip if math.isfinite(args.clip) else None,
        "flush_limit": flush_limit,
        "left_out": {},
    } | measured.figures()
    result |= advice.conclude(result) | {"covers": COVERS}
    return result | {"seconds": time.monotonic() - start, "peak_memory_bytes": peak_memory_bytes("cpu")}


def _make_mode(name: str, source: Source, precisions: Precisions, scale: float | None = None) -> Mode:
    """Return the mode `name` at the weights of `source`, with the static loss scale `scale` if that is given.

    Raises:
        UsageError: the trainer refuses its options.
    """
    mode = MODES[name]
    scaled = {} if scale is None else {"static_loss_scale": scale}
    args = merge(mode.script, {**source.options, **mode.options, **scaled})
    return Mode(name, args, precisions[mode.script], source.model)


def plan_scales(modes: list[Mode], make_half: Callable[[float], Mode]) -> dict[int, Mode]:
    """Return a mode of half weights for each of `MEASURED_KS`: one of `modes` where one has that loss scale.

    `make_half` makes the others, given the loss scale.
    """
    half = {mode.scale: mode for mode in modes if mode.args.fp16 and mode.args.script != "main_amp"}
    return {k: half.get(2.0**k) or make_half(2.0**k) for k in MEASURED_KS}


def _check_batches(asked: int, there: int) -> None:
    if not LEAST_BATCHES <= asked <= there:
        raise UsageError(
            f"--batches {asked}: from {LEAST_BATCHES} (for a deviation and its error) to {there} "
            f"(all that the corpus has) can be measured"
        )


def _job(source: Source) -> dict[str, Any]:
    return {
        "data": source.data,
        "corpus": {"name": source.corpus.name} | description.corpus_facts(source.corpus),
        "model": source.model.options,
        "weights": source.weights,
        "batch_size": source.args.batch_size,
        "bptt": source.args.bptt,
    }


def _about(source: Source, batches: int) -> str:
    """Return the sentence on what was probed."""
    model, args = source.model.options, source.args
    return (
        f"{model['kind']} of {model['nlayers']} layers with {model['nhid']} units and {model['ntokens']} words, "
        f"{_weights(source)}; {batches} batches of {args.batch_size} x {args.bptt} words of "
        f"{printable(source.corpus.name, 60)}."
    )


def _weights(source: Source) -> str:
    weights = source.weights
    if weights["path"] is None:
        return f"fresh weights of seed {source.args.seed}"
    steps = "" if weights["steps"] is None else f" after {weights['steps']} steps"
    return f"weights of {printable(weights['path'])}{steps}"
