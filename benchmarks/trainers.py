"""This project's trainers, built as their scripts build them."""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm.data.corpus import Corpus
from lm.options.config import make_args
from lm.options.modes import MODES
from lm.training.build import make_model
from lm.training.loop import Training
from lm.training.process import set_up


@contextmanager
def trainer(
    mode: str, data: str | Corpus, size: int, device: str = "cpu", **more: bool | int | float
) -> Iterator[Training]:
    """Build what the script of `mode` (a key of MODES) trains on `device`, with layers of `size` units.

    `data` is a corpus or names one; `more` are further options of the script. Its records go to a folder that is
    removed afterwards.
    """
    chosen = MODES[mode]
    with tempfile.TemporaryDirectory() as folder:
        places = {"run_dir": Path(folder, "run"), "save": Path(folder, "model.safetensors")}
        sizes = {"emsize": size, "nhid": size, "device": device, **more}
        named = {"data": data} if isinstance(data, str) else {}
        args = make_args(chosen.script, **chosen.options, **places, **named, **sizes)
        set_up(args)
        corpus = Corpus(args.data) if isinstance(data, str) else data
        model = make_model(args, corpus.vocab_size).to(args.device)
        precision = importlib.import_module(chosen.script).make_precision(args, model)
        training = Training(args, corpus, model, precision)
        yield training
        training.records.close()
