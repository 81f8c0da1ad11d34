"""Train a language model in fp32, or in fp16 with fp32 master weights kept by hand."""

# PYTHON_ARGCOMPLETE_OK
import sys

from lm.launch.entry import answer_early, run_trainer

if __name__ == "__main__":
    answer_early(__file__, __doc__)  # --help and mistakes, before the imports below take their seconds

import torch

from apex_compat.fp16_utils import prep_param_lists
from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.options.options import Options
from lm.training.build import make_model, make_optimizer
from lm.training.loop import fit
from lm.training.process import set_up
from roundoff.precision import MasterWeights, Precision


# --- precision ---------------------------------------------------------------
def make_precision(args: Options, model: RNNModel) -> Precision:
    """Return fp32, or fp16 with fp32 master weights and a static loss scale."""
    params = masters = list(model.parameters())
    if args.fp16:
        params, masters = prep_param_lists(model.to(torch.float16))
    return MasterWeights(params, make_optimizer(args, masters), args.loss_scale or 1.0)


# -----------------------------------------------------------------------------


def main(args: Options) -> int:
    """Build corpus, model and precision, and train."""
    set_up(args)
    corpus = Corpus(args.data)
    model = make_model(args, corpus.vocab_size).to(args.device)
    return fit(args, corpus, model, make_precision(args, model))


if __name__ == "__main__":
    sys.exit(run_trainer(main, __file__, __doc__))
