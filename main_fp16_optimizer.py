"""Train a language model in fp16 with the precision management of FP16_Optimizer."""

# PYTHON_ARGCOMPLETE_OK
import sys

from lm.launch.entry import answer_early, run_trainer

if __name__ == "__main__":
    answer_early(__file__, __doc__)  # --help and mistakes, before the imports below take their seconds

import torch

from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.options.options import Options
from lm.training.apex import import_fp16_utils
from lm.training.build import make_model, make_optimizer
from lm.training.loop import fit
from lm.training.process import set_up
from roundoff.precision import Precision, WrappedOptimizer


# --- precision ---------------------------------------------------------------
def make_precision(args: Options, model: RNNModel) -> Precision:
    """Return FP16_Optimizer over half weights, or over fp32 ones; its loss scale is static or dynamic."""
    if args.fp16:
        model.to(torch.float16)
    optimizer = import_fp16_utils(args.fp16_utils).FP16_Optimizer(
        make_optimizer(args, model.parameters()),
        static_loss_scale=args.loss_scale or 1.0,
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


def main(args: Options) -> int:
    """Build corpus, model and precision, and train."""
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)
    return fit(args, corpus, model, make_precision(args, model))


if __name__ == "__main__":
    sys.exit(run_trainer(main, __file__, __doc__))
