"""A small GPT over characters, probed, and trained with AdamW in four precision modes.

Run it: python examples/gpt.py

It needs the pages' packages: pip install 'roundoff[report]'.
"""

# %%
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roundoff import compare, probe
from roundoff.modes import Build

WIDTH, HEADS, LAYERS, CONTEXT, VOCABULARY = 32, 2, 2, 32, 128
STEPS, BATCH = 60, 16
MODES = ["fp32", "masters-fp16", "amp-fp16", "amp-bf16"]
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="gpt-"))
print(f"| the probe's pages go to {folder}")

# %% [markdown]
# The model: causal attention, LayerNorm before each part, and an embedding that is the decoder too.


# %%
class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, WIDTH) to the same shape."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.feed(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Gives logits of the next token; tokens have the shape (batch, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.decoder = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.decoder.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (batch, time, VOCABULARY)."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.decoder(self.norm(self.blocks(x)))
        return logits


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss in nats a character, in fp32."""
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


# %% [markdown]
# The data: the help texts that come with Python, as ASCII codes. A seed draws the windows.

# %%
text = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))


def batches(seed: int) -> list[Tensor]:
    """Return windows of the text, each of shape (BATCH, CONTEXT + 1)."""
    starts = torch.randint(len(text) - CONTEXT, (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
    return list(text[starts[..., None] + torch.arange(CONTEXT + 1)])


# %% [markdown]
# The probe, at fresh weights.

# %%
report = probe(GPT(), loss, batches(0)[:8], MODES, watch=["decoder"])
print(report)
report.save(folder)


# %%
def train(build: Build, seed: int) -> list[float]:
    """Return the losses of a run."""
    torch.manual_seed(seed)
    model, losses = GPT(), []
    precision = build(model, lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    for tokens in batches(seed):
        model.zero_grad()
        with precision.forward():
            losses.append(loss(model, tokens))
        precision.backward(losses[-1])
        precision.step(max_norm=1.0)
    return [value.item() for value in losses]


print(compare(train, MODES, seeds=2))

# %% [markdown]
# Each mode's error is under a hundredth of the noise between batches, and all losses agree to three digits. The column
# "critical batch" says when that ends: at some ten thousand of these batches in one for `amp-bf16`, at some million for
# fp16.
