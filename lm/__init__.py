"""One job, trained under several kinds of precision management: the word-level language model.

`make_args` makes the options of a trainer, `set_up` prepares the process, `Corpus` and `RNNModel` are the data and the
model, and `fit` trains. Each name is imported when it is first asked for, so that `import lm` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
