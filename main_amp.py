"""Train a language model with torch.autocast and torch.amp.GradScaler."""

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
from roundoff.precision import Autocast, Precision


# --- precision ---------------------------------------------------------------
def make_precision(args: Options, model: RNNModel) -> Precision:
    """Return autocast over fp32 weights with GradScaler; its loss scale is dynamic in fp16, else static."""
    optimizer = make_optimizer(args, model.parameters())
    init = args.loss_scale or args.init_scale
    scaler = torch.amp.GradScaler(torch.device(args.device).type, init_scale=init, growth_interval=args.scale_window)
    return Autocast(optimizer, scaler, args.device, getattr(torch, args.dtype), args.loss_scale)


# -----------------------------------------------------------------------------


def main(args: Options) -> int:
    """Build corpus, model and precision, and train."""
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)
    return fit(args, corpus, model, make_precision(args, model))


if __name__ == "__main__":
    sys.exit(run_trainer(main, __file__, __doc__))
