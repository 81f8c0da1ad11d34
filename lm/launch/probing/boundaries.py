"""Watch the gradients at the outputs of a model's modules, and name all that is measured, in order."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.model.language_model import RNNModel
from lm.model.transformer import Transformer

EMBEDDING, LOGITS = "embedding", "logits"


def layer(index: int) -> str:
    """Return the name of the output of layer `index`."""
    return f"layer {index}"


def tensor_names(model: RNNModel) -> dict[str, str]:
    """Return name -> "parameter" or "boundary", in forward order."""
    names = [name for name, _ in model.named_parameters()]
    kinds = dict.fromkeys(names[:1], "parameter") | {EMBEDDING: "boundary"}
    for index in range(model.options["nlayers"]):
        mine = f"rnn.layers.{index}." if isinstance(model.rnn, Transformer) else f"_l{index}"
        kinds |= {name: "parameter" for name in names if name.startswith(mine) or name.endswith(mine)}
        kinds[layer(index)] = "boundary"
    return kinds | dict.fromkeys(names, "parameter") | {LOGITS: "boundary"}


def watch(model: RNNModel) -> dict[str, Tensor]:
    """Return a dict that each backward pass of `model` fills from now on: name of a boundary -> gradient.

    The logits are not in it. Recurrent layers, which torch runs as one module, run one at a time from now on. Their
    operations, the order of these and the random numbers stay the same; a test holds them to equal bits.
    """
    gradients: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradients.update({name: gradient}))  # type: ignore[no-untyped-call]

    model.encoder.register_forward_hook(lambda module, args, output: keep(EMBEDDING, output))
    if isinstance(model.rnn, Transformer):
        for index, module in enumerate(model.rnn.layers):
            module.register_forward_hook(lambda module, args, output, index=index: keep(layer(index), output))
    else:
        model.rnn.forward = _one_at_a_time(model.rnn, keep)
    return gradients


def _one_at_a_time(rnn: nn.RNNBase, keep: Callable[[str, Tensor], None]) -> Callable[..., Any]:
    layers = [_single(rnn, index) for index in range(rnn.num_layers)]

    def forward(input: Tensor, hx: Any) -> tuple[Tensor, Any]:
        states = hx if isinstance(hx, tuple) else (hx,)
        last = []
        for index, single in enumerate(layers):
            mine = tuple(state[index : index + 1] for state in states)
            input, after = single(input, mine if isinstance(hx, tuple) else mine[0])
            keep(layer(index), input)
            if index + 1 < len(layers):
                input = F.dropout(input, rnn.dropout, rnn.training)
            last.append(after if isinstance(hx, tuple) else (after,))
        new = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        return input, new if isinstance(hx, tuple) else new[0]

    return forward


def _single(rnn: nn.RNNBase, index: int) -> nn.RNNBase:
    """Return the one layer `index` as a module that has its weights in common with `rnn`."""
    options = {"nonlinearity": rnn.nonlinearity} if isinstance(rnn, nn.RNN) else {}
    with torch.device("meta"):  # no memory, no random numbers
        single = type(rnn)(rnn.input_size if index == 0 else rnn.hidden_size, rnn.hidden_size, **options)  # type: ignore[arg-type]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(single, f"{name}_l0", getattr(rnn, f"{name}_l{index}"))
    return single.train(rnn.training)
