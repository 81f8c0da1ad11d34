"""From what is to be probed to all of probe.json."""

import math
import time
from typing import Any

from lm.data.corpus import batchify
from lm.launch.probing.measure import Plan, Probe, plan_scales
from lm.launch.probing.mode import Mode
from lm.launch.probing.sources import Source
from lm.training import description
from roundoff.device import peak_memory_bytes
from roundoff.gradients import advice
from roundoff.gradients.result import FORMAT

COVERS = [
    "The true gradient is that of the same model and loss in float64, at the fp32 weights, with the same batch, "
    "dropout masks and hidden state. A mode's error so has the rounding of its weights and of the hidden state in it; "
    "that of the weights is the same in every batch, and is bias here, but changes as training moves them.",
    "Half gradients are taken as the trainers' own code leaves them before its step, and divided by the loss scale in "
    "float64. CPU kernels differ between modes, and so do their errors; those of a GPU were not measured.",
    "Elements that are inf or nan are counted as overflowed and left out of errors and bias.",
    "Shares are of the elements that are not 0 in the reference (nor under 2**-40 of the tensor's largest). Predicted "
    "ones are of the reference's own values, rounded to fp16 once; measured ones have in them what was flushed further "
    "up on the way back.",
    "Noise, bias and their standard errors come from inner products of sketches, true to about 1%, and from as many "
    "batches as are named here, in the order of the text; other text may differ.",
    "Gradients at one set of weights: errors that add up over steps, and what an optimizer makes of them, are not "
    "seen. Stagnation is of SGD's updates, lr times the clipped gradient.",
]


def probe(source: Source, names: list[str], batches: int, flush_limit: float, command: list[str]) -> dict[str, Any]:
    """Probe the modes `names`; `command` is what the user ran.

    Raises:
        UsageError: the corpus has too few batches, a trainer refuses its flags, or this machine cannot run a mode.
    """
    start, args = time.monotonic(), source.args
    modes = [Mode(name, source.options) for name in names]
    # AdamW's updates are not a multiple of the gradient.
    lr = args.lr if args.optimizer == "sgd" else None
    scales = plan_scales(modes, source.options)
    plan = Plan(modes, scales, batches, args.bptt, args.seed, lr, args.clip)
    measured = Probe(source.model, plan)
    measured.run(batchify(source.corpus.train, args.batch_size, "cpu"))
    result = {
        "format": FORMAT,
        "environment": description.environment(command),
        "data": source.data,
        "corpus": description.corpus_facts(source.corpus),
        "model": source.model.options,
        "weights": source.weights,
        "seed": args.seed,
        "batches": batches,
        "batch_size": args.batch_size,
        "bptt": args.bptt,
        "lr": args.lr,
        "clip": args.clip if math.isfinite(args.clip) else None,
        "flush_limit": flush_limit,
        "seconds": 0.0,
        "peak_memory_bytes": 0,
    } | measured.figures()
    result |= {"window": advice.window(result), "scale": advice.take(result), "advice": advice.advise(result)}
    return result | {
        "covers": COVERS,
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": peak_memory_bytes("cpu"),
    }
