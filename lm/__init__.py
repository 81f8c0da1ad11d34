"""Training a language model under several kinds of precision management.

What a program of one's own needs is here by name: the seam (`MasterWeights`, `WrappedOptimizer`, `Autocast`, all of
them a `Precision` whose `step` gives a `StepResult`) for any model, and the language model's job around it
(`make_args`, `set_up`, `Corpus`, `RNNModel`, `fit`, `read_run`). Each is imported when it is first asked for, so that
`import lm` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.config import make_args as make_args
    from lm.config import set_up as set_up
    from lm.data import Corpus as Corpus
    from lm.model import RNNModel as RNNModel
    from lm.precision import Autocast as Autocast
    from lm.precision import MasterWeights as MasterWeights
    from lm.precision import Precision as Precision
    from lm.precision import StepResult as StepResult
    from lm.precision import WrappedOptimizer as WrappedOptimizer
    from lm.report.runs import read_run as read_run
    from lm.train import fit as fit

__version__ = "0.1.0"

_HOMES = {
    "lm.config": ("make_args", "set_up"),
    "lm.data": ("Corpus",),
    "lm.model": ("RNNModel",),
    "lm.precision": ("Autocast", "MasterWeights", "Precision", "StepResult", "WrappedOptimizer"),
    "lm.report.runs": ("read_run",),
    "lm.train": ("fit",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
