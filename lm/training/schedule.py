"""The schedule of the learning rate: what each step of a run uses."""

import math

from lm.options.options import Options


def batches_of_epoch(args: Options, tokens: int) -> int:
    """Return how many batches an epoch over `tokens` words of training text has; a short one at the end counts."""
    rows = tokens // args.batch_size
    return len(range(0, rows - 1, args.bptt))


def steps_of_run(args: Options, batches: int) -> int:
    """Return the steps that --epochs, --max-steps and --dry-run set, with `batches` an epoch: what a cosine lasts."""
    limit = 1 if args.dry_run else args.max_steps or math.inf
    return int(min(args.epochs * batches, limit))


def rate_of_step(args: Options, lr: float, step: int, batches: int) -> float:
    """Return the learning rate of a step: a function of the options, of validations so far, and of nothing else.

    --warmup W multiplies the rates of the first W steps by 1/W, 2/W, and so on. The rest depends on --lr-schedule:

    anneal    `lr`
    constant  `lr`
    cosine    `lr` times (1 + cos(pi * step / steps)) / 2, with all `steps_of_run`: `lr` at first, 0 after the last
              step (Loshchilov and Hutter, "SGDR", 2017, eq. 5)

    Args:
        args: the options.
        lr: --lr; with anneal, divided after each validation that brought nothing.
        step: from 0; skipped ones count. After the last step of a run, its rate stays.
        batches: of an epoch.
    """
    warmup = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    if args.lr_schedule != "cosine":
        return lr * warmup
    steps = steps_of_run(args, batches)
    return lr * warmup * (1.0 + math.cos(math.pi * min(step, steps - 1) / steps)) / 2.0
