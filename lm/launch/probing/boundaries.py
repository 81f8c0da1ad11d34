"""Watch the gradients at the outputs of a model's modules, and name all that is measured, in order."""

from torch import Tensor

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

    The logits are not in it. What the model computes stays the same; a test holds it to equal bits.
    """
    gradients: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradients.update({name: gradient}))  # type: ignore[no-untyped-call]

    model.encoder.register_forward_hook(lambda module, args, output: keep(EMBEDDING, output))
    if isinstance(model.rnn, Transformer):
        for index, module in enumerate(model.rnn.layers):
            module.register_forward_hook(lambda module, args, output, index=index: keep(layer(index), output))
    else:
        run = model.rnn.one_layer

        def kept(index: int, input: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            output, after = run(index, input, states)
            keep(layer(index), output)
            return output, after

        model.rnn.one_layer = kept  # type: ignore[method-assign]
    return gradients
