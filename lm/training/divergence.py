"""Tell a run that has diverged, and where that began.

A run has diverged, and ends so, where one of these is true:

1. The loss or a gradient was not finite in --max-skipped steps in a row.
2. After an epoch or at the end, a weight is not finite. A half weight is inf where its master is above 65504.
3. A validation or test loss has no finite perplexity. It is inf, nan, or above 709 nats a word.
4. The run has come to its end, and the test loss of its best model is above ten times what guessing costs. To guess all
   words of the vocabulary alike costs its logarithm: 10.4 nats for the 33,278 words of WikiText-2.

A run that learns anything is far from all of these. One whose loss jumps may come back until its end.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch

from lm.model.language_model import RNNModel
from lm.options.modes import mode_of
from lm.options.options import Options
from lm.training import distributed
from roundoff.errors import RunError, UsageError
from roundoff.runs.reading import read_run

LARGEST = math.log(sys.float_info.max)
"""The largest loss whose perplexity is finite."""
WORSE_THAN_GUESSING = 10.0
"""How many times the loss of guessing a run may end with."""
END = "test loss"
"""The name of the loss by which the end of a run is judged."""


def skipped_too_often(args: Options, model: RNNModel, row: dict[str, Any]) -> str:
    """Return the message of a run whose last step was `row`; `model` must still have the gradients of that step."""
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    advice = "a smaller --lr"
    if args.dtype == "float16":
        if args.loss_scale is not None:
            dynamic = "--dynamic-loss-scale" if args.script == "main_fp16_optimizer" else "main_amp.py's dynamic one"
            advice += f", a smaller --static-loss-scale, {dynamic}"
        advice += ", or main_amp.py --dtype bfloat16"
    return (
        f"{_has_diverged(args)}: the loss or a gradient was not finite in "
        f"{args.max_skipped} steps in a row, up to step {row['step']}, at loss scale {row['loss_scale']:g}; "
        f"first parameter with a non-finite gradient: {bad[0] if bad else 'none'}; try {advice}"
    )


def check(args: Options, model: RNNModel, run_dir: Path | None, name: str, loss: float, vocab_size: int) -> None:
    """Raise RunError where a run has diverged by what `model` is now; all processes of the run must ask.

    Args:
        args: its options.
        model: as it was evaluated.
        run_dir: with the rows of all steps; None in a process that does not write them.
        name: of the loss: `END`, or another such as "validation loss of epoch 1".
        loss: in nats a word, the same in all processes.
        vocab_size: how many words the model tells apart.
    """
    guessing = math.log(vocab_size)
    largest = min(LARGEST, WORSE_THAN_GUESSING * guessing) if name == END else LARGEST
    weights = model.state_dict()
    largest_weights = torch._foreach_norm(list(weights.values()), math.inf)  # `isfinite` would copy each weight
    finite = torch.stack([weight.isfinite() for weight in largest_weights]).tolist()
    if all(finite) and loss <= largest:
        return
    last, first = (int(distributed.broadcast(step)) for step in _began(run_dir, WORSE_THAN_GUESSING * guessing))
    if all(finite):
        what = f"the {name} is {loss:.4g} nats a word, where guessing costs {guessing:.1f}"
    else:
        what = f"after step {last} a weight of {list(weights)[finite.index(False)]} is not finite"
    bound = f"{WORSE_THAN_GUESSING * guessing:.0f}"
    began = f"from step {first} on no training loss is below {bound}"
    if first > last:
        began = f"up to step {last} the training loss is below {bound}"
    advice = "a smaller --lr" + (", or --clip 0.25" if args.clip == math.inf else "")
    if args.dtype == "float16" and args.opt_level == "O2":
        advice += ", or main_amp.py without --opt-level, whose weights are fp32"
    elif args.dtype == "float16" and args.script != "main_amp":
        advice += ", or main_amp.py, whose weights are fp32"
    raise RunError(f"{_has_diverged(args)}: {what}; {began}; try {advice}")


def _has_diverged(args: Options) -> str:
    return f"{args.script}.py in mode {mode_of(args).name} has diverged"


def _began(run_dir: Path | None, bound: float) -> tuple[int, int]:
    """Return the last step, and the first step from which on no training loss is at most `bound`."""
    try:
        losses = [] if run_dir is None else read_run(run_dir).steps["loss"]
    except (UsageError, OSError):
        losses = []
    within = [step for step, loss in enumerate(losses, 1) if loss <= bound]
    return len(losses), 1 + (within[-1] if within else 0)
