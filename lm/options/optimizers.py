"""The optimizers that a trainer can be told to use."""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from roundoff.errors import UsageError

DEFAULT_LR = {"sgd": 20.0, "adamw": 0.001}
"""Of each optimizer. AdamW's steps have the size of the learning rate whatever that of the gradient: 20 is far off."""
TRANSFORMER_LR = 5.0
"""Of plain SGD, as the PyTorch example advises. One epoch of --data python-docs with 64 units ends at test perplexity
134 with it, at 183 with 0.5, and at 1919 with the 20 of recurrent layers."""


def default_lr(optimizer: str, model: str) -> float:
    """Of `optimizer`, one of `DEFAULT_LR`, for a model of this kind."""
    return TRANSFORMER_LR if (optimizer, model) == ("sgd", "Transformer") else DEFAULT_LR[optimizer]


def resolve_optimizer(args: argparse.Namespace) -> None:
    """Set `args.optimizer` where only --use-optimizer or nothing was given, and its default for `args.lr`.

    Raises:
        UsageError: --use-optimizer with another optimizer than the one that it stands for.
    """
    asked = getattr(args, "optimizer", None)
    if args.use_optimizer and asked not in (None, "adamw"):
        raise UsageError(f"--use-optimizer (AdamW) and --optimizer {asked} contradict each other: give one of them")
    args.optimizer = asked or ("adamw" if args.use_optimizer else "sgd")
    args.lr = getattr(args, "lr", default_lr(args.optimizer, args.model))


def make_optimizer(args: argparse.Namespace, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of these options over `params`; all else is as torch has it, such as AdamW's weight decay.

    It is fused, so that it can be told on the device to skip a step: then no weight, moment or step count changes.
    """
    kind: Any = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD
    optimizer: torch.optim.Optimizer = kind(params, lr=args.lr, fused=True)
    return optimizer
