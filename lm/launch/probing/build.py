"""The precision of each mode, built by the very statements of the trainers; a test compares the two texts."""

import argparse

import torch

from apex_compat.fp16_utils import prep_param_lists
from lm.model.language_model import RNNModel
from lm.options.optimizers import make_optimizer
from lm.training.apex import import_fp16_utils
from roundoff.precision import Autocast, MasterWeights, Precision, WrappedOptimizer


def build(args: argparse.Namespace, model: RNNModel) -> Precision:
    """What the trainer `args.script` makes of `model`, whose weights become half where the mode has them so."""
    return {"main": _main, "main_fp16_optimizer": _main_fp16_optimizer, "main_amp": _main_amp}[args.script](args, model)


def loss_scale(args: argparse.Namespace) -> float:
    """By which that precision multiplies its first loss."""
    return float(args.static_loss_scale or args.init_scale)


def _main(args: argparse.Namespace, model: RNNModel) -> Precision:
    params = masters = list(model.parameters())
    if args.fp16:
        params, masters = prep_param_lists(model.to(torch.float16))
    optimizer = make_optimizer(args.optimizer, masters, args.lr)
    precision = MasterWeights(params, optimizer, args.static_loss_scale)
    return precision  # noqa: RET504 - the lines above are those of the script


def _main_fp16_optimizer(args: argparse.Namespace, model: RNNModel) -> Precision:
    if args.fp16:
        model.to(torch.float16)
    optimizer = import_fp16_utils(args.fp16_utils).FP16_Optimizer(
        make_optimizer(args.optimizer, model.parameters(), args.lr),
        static_loss_scale=args.static_loss_scale or 1.0,
        dynamic_loss_scale=args.dynamic_loss_scale,
        dynamic_loss_args={
            "init_scale": args.init_scale,
            "scale_window": args.scale_window,
            "max_loss_scale": max(args.init_scale, 2.0**24),
        },
        verbose=False,
    )
    precision = WrappedOptimizer(optimizer)
    return precision  # noqa: RET504 - the lines above are those of the script


def _main_amp(args: argparse.Namespace, model: RNNModel) -> Precision:
    optimizer = make_optimizer(args.optimizer, model.parameters(), args.lr)
    init = args.static_loss_scale or args.init_scale
    scaler = torch.amp.GradScaler(torch.device(args.device).type, init_scale=init, growth_interval=args.scale_window)
    precision = Autocast(optimizer, scaler, args.device, getattr(torch, args.dtype), args.static_loss_scale)
    return precision  # noqa: RET504 - the lines above are those of the script
