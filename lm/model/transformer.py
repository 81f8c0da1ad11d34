"""Transformer layers in the place of recurrent ones: causal self-attention over the words of a batch.

torch's own `nn.TransformerEncoder`, whose products go through `lm.model.kernels.linear`, so that half dtypes run at a
usable speed on every CPU. Where the CPU has instructions for them they are torch's operations in torch's order.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.model.kernels import compute_dtype, half_through_fp32, linear, without_autocast


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Layer(nn.TransformerEncoderLayer):
    def __init__(self, emsize: int, nhead: int, nhid: int, dropout: float) -> None:
        super().__init__(emsize, nhead, nhid, dropout)
        self.linear1.__class__ = self.linear2.__class__ = _Linear  # as torch drew them

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """Self-attention as `nn.MultiheadAttention` computes it, always causal."""
        attention = self.self_attn
        length, batch, emsize = x.shape
        shape = (length, batch * attention.num_heads, emsize // attention.num_heads)
        qkv = linear(x, attention.in_proj_weight, attention.in_proj_bias)
        # Of one layout for all dtypes: the kernels that sum in an order of their own choose it by that.
        q, k, v = (
            part.contiguous().view(shape).transpose(0, 1).view(batch, attention.num_heads, length, -1)
            for part in qkv.chunk(3, dim=-1)
        )
        attended = _attention(q, k, v, attention.dropout if self.training else 0.0)
        attended = attended.permute(2, 0, 1, 3).reshape(length, batch, emsize)
        output: Tensor = self.dropout1(linear(attended, attention.out_proj.weight, attention.out_proj.bias))
        return output


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention, each argument of shape (batch, heads, words, emsize / heads), and so is the result."""
    if not half_through_fp32(q):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    half = compute_dtype(q)
    with without_autocast(q):
        q, k, v = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).to(half)


class Transformer(nn.TransformerEncoder):
    """Encoder layers (self-attention, then a feed-forward network) that see no later word; ReLU, norms last.

    As torch makes them, all layers start from the same draw.

    Args:
        emsize: width of the layers; a multiple of `nhead`.
        nhead: heads of the attention.
        nhid: width of the feed-forward networks.
        nlayers: how many layers.
        dropout: probability, on the attention weights and after each part of a layer.
    """

    def __init__(self, emsize: int, nhead: int, nhid: int, nlayers: int, dropout: float) -> None:
        super().__init__(_Layer(emsize, nhead, nhid, dropout), nlayers, enable_nested_tensor=False)

    def forward(self, input: Tensor, hidden: tuple[()]) -> tuple[Tensor, tuple[()]]:  # type: ignore[override]
        """Map (words, batch, emsize) to the same shape, as a recurrent layer does; `hidden`, the state, is ()."""
        for layer in self.layers:
            input = layer(input)
        return input, hidden


def positions(words: int, like: Tensor) -> Tensor:
    """Return sines and cosines of each position (Vaswani et al., "Attention Is All You Need", 3.5), interleaved.

    Shape (words, 1, emsize) for `like` of shape (..., emsize), in its dtype, from fp32.
    """
    emsize = like.size(-1)
    position = torch.arange(words, dtype=torch.float32, device=like.device)[:, None]
    angle = position * frequencies(emsize, like.device)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, None, :emsize].to(like.dtype)


def frequencies(emsize: int, device: torch.device | None = None) -> Tensor:
    """Return the frequencies of the sines and cosines, in radians a position: fp32, shape (ceil(emsize / 2),)."""
    even = torch.arange(0, emsize, 2, dtype=torch.float32, device=device)
    return torch.exp(even * (-math.log(10000.0) / emsize))
