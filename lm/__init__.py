"""One job, trained under several kinds of precision management: the word-level language model.

`make_args` makes the options of a trainer, `set_up` prepares the process, `Corpus` and `RNNModel` are the data and the
model, and `fit` trains. Each name is imported when it is first asked for, so that `import lm` takes no time.
"""

from typing import TYPE_CHECKING

from roundoff.lazy import front_door

if TYPE_CHECKING:
    from lm.data.corpus import Corpus as Corpus
    from lm.model.language_model import RNNModel as RNNModel
    from lm.options.config import make_args as make_args
    from lm.training.loop import fit as fit
    from lm.training.process import set_up as set_up

_HOMES = {
    "lm.data.corpus": ("Corpus",),
    "lm.model.language_model": ("RNNModel",),
    "lm.options.config": ("make_args",),
    "lm.training.process": ("set_up",),
    "lm.training.loop": ("fit",),
}
__getattr__, __dir__ = front_door(__name__, _HOMES)
