"""This project's trainers, built as their scripts build them."""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from lm.options.modes import MODES
from lm.training.loop import Training


@contextmanager
def trainer(mode: str, data: str, size: int) -> Iterator[Training]:
    """What the script of `mode` (a key of MODES) builds for layers of `size` units, ready to train.

    Its records go to a folder that is removed afterwards.
    """
    script, *flags = MODES[mode]
    module = importlib.import_module(script.removesuffix(".py"))
    with tempfile.TemporaryDirectory() as folder:
        where = ["--run-dir", f"{folder}/run", "--save", str(Path(folder, "model.safetensors"))]
        argv = [script, *flags, "--data", data, "--emsize", str(size), "--nhid", str(size), *where]
        with patch.object(sys, "argv", argv), patch.object(module, "fit") as fit:
            module.main()
        training = Training(*fit.call_args.args)
        yield training
        training.records.close()
