"""Train a language model in fp32, or in fp16 with fp32 master weights kept by hand."""

# PYTHON_ARGCOMPLETE_OK
import argparse
import sys

import torch

from apex_compat.fp16_utils import prep_param_lists
from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel, make_model
from lm.options.config import parse_args, set_up
from lm.options.optimizers import make_optimizer
from lm.training.loop import fit
from lm.training.program import exit_code
from roundoff.precision import MasterWeights, Precision


# --- precision ---------------------------------------------------------------
def make_precision(args: argparse.Namespace, model: RNNModel) -> Precision:
    """Return fp32, or fp16 with fp32 master weights and a static loss scale."""
    params = masters = list(model.parameters())
    if args.fp16:
        params, masters = prep_param_lists(model.to(torch.float16))
    return MasterWeights(params, make_optimizer(args, masters), args.static_loss_scale)


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
