"""Train a language model with torch.autocast and torch.amp.GradScaler."""

# PYTHON_ARGCOMPLETE_OK
import sys

import torch

from lm.data.corpus import Corpus
from lm.model.language_model import make_model
from lm.options.config import parse_args, set_up
from lm.options.optimizers import make_optimizer
from lm.training.loop import fit
from lm.training.program import exit_code
from roundoff.precision import Autocast


def main() -> int:
    """Build corpus, model and precision management, and train."""
    args = parse_args(__file__, __doc__)
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)

    # --- precision -----------------------------------------------------------
    optimizer = make_optimizer(args.optimizer, model.parameters(), args.lr)
    init = args.static_loss_scale or args.init_scale
    scaler = torch.amp.GradScaler(torch.device(args.device).type, init_scale=init, growth_interval=args.scale_window)
    precision = Autocast(optimizer, scaler, args.device, getattr(torch, args.dtype), args.static_loss_scale)
    # -------------------------------------------------------------------------

    return fit(args, corpus, model, precision)


if __name__ == "__main__":
    sys.exit(exit_code(main))
