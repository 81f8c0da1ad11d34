"""`from lm import ...`: the job as a program of one's own runs it is the job of the command line."""

import re
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch

import lm
import roundoff
from programs import ROOT, TINY
from roundoff.errors import UsageError
from runs import outcome

OPTIONS: dict[str, Any] = {
    "data": "corpus", "emsize": 8, "nhid": 8, "batch_size": 4, "bptt": 5, "epochs": 2,
    "run_dir": "api", "save": "api.pt",
}  # fmt: skip


def build(script: str, args: Any, model: Any) -> Any:
    if script == "main":
        return roundoff.MasterWeights(model.parameters(), torch.optim.SGD(model.parameters(), lr=args.lr, fused=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=args.init_scale, growth_interval=args.scale_window)
    return roundoff.Autocast(optimizer, scaler, args.device, torch.float16, args.loss_scale)


@pytest.mark.parametrize("script", ["main", "main_amp"])
def test_fit_from_python_is_the_run_of_the_command_line(programs, script):
    assert programs.run(script, *TINY).code == 0
    args = lm.make_args(script, **OPTIONS)
    lm.set_up(args)
    corpus = lm.Corpus(args.data)
    model = lm.RNNModel(args.model, corpus.vocab_size, args.emsize, args.nhid, args.nlayers, args.dropout, args.tied)
    assert lm.fit(args, corpus, model, build(script, args, model)) == 0
    assert outcome(programs.folder, "api", "api.pt") == outcome(programs.folder)
    recorded = [roundoff.read_run(programs.folder / name) for name in ("api", "run")]
    assert recorded[0].steps == recorded[1].steps
    assert len(recorded[0].steps["loss"]) == 36
    assert programs.run(script, "--resume", "api", "--epochs", "3").code == 0  # what Python began, a shell goes on with
    assert len(roundoff.read_run(programs.folder / "api").epochs) == 3


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("main.py", {}, "script is 'main.py'; allowed are main, main_fp16_optimizer, main_amp"),
        ("main", {"epcohs": 3}, "there is no option 'epcohs'; did you mean epochs?"),
        ("main", {"dtype": "float16"}, "there is no option 'dtype'"),
        ("main", {"lr": -1}, "argument --lr: '-1' is not a number above 0"),
        ("main", {"tied": 1}, "argument --tied: 1 is neither true nor false"),
        ("main_amp", {"fp16": True, "dtype": "bfloat16"}, "--fp16 and --dtype bfloat16 contradict"),
    ],
)
def test_a_wrong_option_is_a_clear_error(script, options, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        lm.make_args(script, **options)


def test_every_name_is_that_of_its_module():
    for package, expected in (
        (lm, {"Corpus", "RNNModel", "fit"}),
        (roundoff, {"Listener", "MasterWeights", "RunDirectory"}),
    ):
        names = {name: module for module, names in package._HOMES.items() for name in names}
        assert expected <= names.keys()
        for name, module in names.items():
            assert getattr(package, name) is getattr(import_module(module), name)
        assert names.keys() <= set(dir(package))
    with pytest.raises(AttributeError, match=r"module 'lm' has no attribute 'Corpora'"):
        _ = lm.Corpora
    with pytest.raises(ImportError, match="cannot import name 'Corpora' from 'lm'"):
        from lm import Corpora  # noqa: F401


def test_importing_lm_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import lm\n"
        "assert {'lm', 'lm.model.language_model', 'torch'} & set(sys.modules) == {'lm'}, sys.modules.keys() - before\n"
        "from lm import data\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
