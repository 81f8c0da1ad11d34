"""Train a language model in fp16 with the precision management of FP16_Optimizer."""

# PYTHON_ARGCOMPLETE_OK
import sys

import torch

from lm.data.corpus import Corpus
from lm.model.language_model import make_model
from lm.options.config import parse_args, set_up
from lm.options.optimizers import make_optimizer
from lm.training.apex import import_fp16_utils
from lm.training.loop import fit
from lm.training.program import exit_code
from roundoff.precision import WrappedOptimizer


def main() -> int:
    """Build corpus, model and precision management, and train."""
    args = parse_args(__file__, __doc__)
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)

    # --- precision -----------------------------------------------------------
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
    # -------------------------------------------------------------------------

    return fit(args, corpus, model, precision)


if __name__ == "__main__":
    sys.exit(exit_code(main))
