"""Train the language model in fp32 and under bfloat16 autocast, from Python, and plot both losses.

Run it: python examples/two_modes.py

It needs matplotlib: pip install 'roundoff[report]'.
"""

# %%
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from lm import Corpus, RNNModel, fit, make_args, set_up
from roundoff import Autocast, MasterWeights, Precision, read_run

folder = Path(tempfile.mkdtemp(prefix="two-modes-"))
job: dict[str, Any] = {
    "data": "python-docs",
    "emsize": 32,
    "nhid": 32,
    "dropout": 0.0,
    "bptt": 10,
    "max_steps": 100,
    "epochs": 1,
}

# %% [markdown]
# The modes share everything but the lines that build their `precision`. Each trainer script has options of its own,
# hence its name: `make_args` gives the defaults of its flags, but for what is named here.


# %%
def fp32(model: RNNModel, lr: float) -> Precision:
    """Keep weights and arithmetic in fp32."""
    return MasterWeights(model.parameters(), torch.optim.SGD(model.parameters(), lr=lr))


def amp(model: RNNModel, lr: float) -> Precision:
    """Keep weights in fp32, and multiply in bfloat16, which needs no loss scale."""
    return Autocast(torch.optim.SGD(model.parameters(), lr=lr), dtype=torch.bfloat16)


def train(name: str, script: str, build: Callable[[RNNModel, float], Precision], **options: Any) -> None:
    """Train once, and record it in `folder`."""
    args = make_args(script, **job, **options, run_dir=folder / name, save=folder / f"{name}.safetensors")
    set_up(args)
    corpus = Corpus(args.data)
    model = RNNModel(args.model, corpus.vocab_size, args.emsize, args.nhid, args.nlayers, args.dropout)
    fit(args, corpus, model, build(model, args.lr))


# %%
train("fp32", "main", fp32)
train("amp-bf16", "main_amp", amp, dtype="bfloat16")

# %% [markdown]
# All numbers are in the run directories, which `compare.py` reads too.

# %%
figure, axis = plt.subplots()
for name in ("fp32", "amp-bf16"):
    run = read_run(folder / name)
    assert run.result is not None  # noqa: S101
    axis.plot(run.steps["step"], run.steps["loss"], label=f"{name}, test perplexity {run.result['test_ppl']:.0f}")
axis.set(xlabel="step", ylabel="training loss (nats a word)")
axis.legend()
figure.savefig(folder / "two_modes.png")
print(f"| the plot is {folder / 'two_modes.png'}")
