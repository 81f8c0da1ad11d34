"""Train a language model in fp16 with the precision management of FP16_Optimizer."""

# PYTHON_ARGCOMPLETE_OK
import argparse
import sys

import torch

from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel, make_model
from lm.options.config import parse_args, set_up
from lm.options.optimizers import make_optimizer
from lm.training.apex import import_fp16_utils
from lm.training.loop import fit
from lm.training.program import exit_code
from roundoff.precision import Precision, WrappedOptimizer


# --- precision ---------------------------------------------------------------
def make_precision(args: argparse.Namespace, model: RNNModel) -> Precision:
    """Return FP16_Optimizer over half weights, or over fp32 ones; its loss scale is static or dynamic."""
    if args.fp16:
        model.to(torch.float16)
    optimizer = import_fp16_utils(args.fp16_utils).FP16_Optimizer(
        make_optimizer(args, model.parameters()),
        static_loss_scale=args.static_loss_scale or 1.0,
        dynamic_loss_scale=args.dynamic_loss_scale,
        dynamic_loss_args={
            "init_scale": args.init_scale,
            "scale_window": args.scale_window,
            "max_loss_scale": max(args.init_scale, 2.0**24),
        },
        verbose=False,
    )
    return WrappedOptimizer(optimizer)


# -----------------------------------------------------------------------------


def main() -> int:
    """Build corpus, model and precision management, and train."""
    args = parse_args(__file__, __doc__)
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)
    return fit(args, corpus, model, make_precision(args, model))


if __name__ == "__main__":
    sys.exit(exit_code(main))
