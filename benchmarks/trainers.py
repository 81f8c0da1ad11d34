"""This project's trainers, built as their scripts build them."""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from lm.options.config import make_args
from lm.options.modes import MODES
from lm.training.loop import Training


@contextmanager
def trainer(mode: str, data: str, size: int) -> Iterator[Training]:
    """What the script of `mode` (a key of MODES) builds for layers of `size` units, ready to train.

    Its records go to a folder that is removed afterwards.
    """
    chosen = MODES[mode]
    module = importlib.import_module(chosen.script)
    with tempfile.TemporaryDirectory() as folder:
        where = {"run_dir": Path(folder, "run"), "save": Path(folder, "model.pt")}
        args = make_args(chosen.script, **chosen.options, data=data, emsize=size, nhid=size, **where)
        with patch.object(module, "fit") as fit:
            module.main(args)
        training = Training(*fit.call_args.args)
        yield training
        training.records.close()
