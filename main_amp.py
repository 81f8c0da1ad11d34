"""Train a language model with torch.autocast and torch.amp.GradScaler, or as apex.amp did."""

# PYTHON_ARGCOMPLETE_OK
import sys

from lm.launch.entry import answer_early, run_trainer

if __name__ == "__main__":
    answer_early(__file__, __doc__)  # --help and mistakes, before the imports below take their seconds

import torch

from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.options.options import Options
from lm.training.build import make_model, make_optimizer
from lm.training.loop import fit
from lm.training.process import set_up
from roundoff.apex_amp import AmpPrecision
from roundoff.precision import Autocast, Precision


# --- precision ---------------------------------------------------------------
def make_precision(args: Options, model: RNNModel) -> Precision:
    """Return autocast over fp32 weights with GradScaler, or apex's amp; the loss scale is dynamic in fp16, else 1."""
    optimizer, dtype = make_optimizer(args, model.parameters()), getattr(torch, args.dtype)
    if args.opt_level is not None:
        policy = args.loss_scale, args.init_scale, args.scale_window
        return AmpPrecision(model, optimizer, args.opt_level, dtype, *policy)
    init = args.loss_scale or args.init_scale
    scaler = torch.amp.GradScaler(torch.device(args.device).type, init_scale=init, growth_interval=args.scale_window)
    return Autocast(optimizer, scaler, args.device, dtype, args.loss_scale)


# -----------------------------------------------------------------------------


def main(args: Options) -> int:
    """Build corpus, model and precision, and train."""
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)
    return fit(args, corpus, model, make_precision(args, model))


if __name__ == "__main__":
    sys.exit(run_trainer(main, __file__, __doc__))
