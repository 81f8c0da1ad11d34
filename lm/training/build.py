"""The model and the optimizer that options ask for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lm.model.language_model import RNNModel
from lm.options.options import Options
from lm.training.eager_optimizer import eager


def make_model(args: Options, ntokens: int) -> RNNModel:
    """Return the model of these options, in fp32 on the CPU, for a vocabulary of `ntokens`."""
    sizes = args.emsize, args.nhid, args.nlayers
    return RNNModel(args.model, ntokens, *sizes, args.dropout, args.tied, args.nhead, args.bptt)


def make_optimizer(args: Options, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of these options over `params`; all else is as torch has it, such as AdamW's weight decay.

    It is fused, so that it can be told on the device to skip a step: then no weight, moment or step count changes.
    """
    kind: Any = eager(torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD)
    optimizer: torch.optim.Optimizer = kind(params, lr=args.lr, fused=True)
    return optimizer
