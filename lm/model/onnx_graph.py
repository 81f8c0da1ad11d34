"""The language model as an ONNX graph: operators that every runtime has, and any batch size and number of words.

The graph is written here node by node, each recurrent layer as one. torch's own exporter fixes the number of words of
some layers at that of its example.

Imported only where --onnx-export asks for it.
"""

import json
import math
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import roundoff
from lm.model.language_model import RNNModel
from lm.model.transformer import Transformer, frequencies

OPSET = 17
"""The first one with LayerNormalization: of 2022."""
IR_VERSION = 8  # of the same release

GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
"""ONNX's order of the gates (LSTM: i o f c, GRU: z r h), as places in torch's (i f g o, r z n)."""


def build(model: RNNModel, vocabulary: list[str]) -> onnx.ModelProto:
    """Return `model` as ONNX computes it, without dropout. Its metadata have the vocabulary and the options as JSON.

    Inputs are `tokens` (int64, shape (words, batch)) and the state: `hidden`, of LSTM also `cell`, each fp32 of shape
    (nlayers, batch, nhid); a Transformer has none. Outputs are `logits` (fp32, shape (words, batch, ntokens)), and the
    new state as `new_hidden` and `new_cell`.

    Args:
        model: its weights are fp32.
        vocabulary: the word of each id; scores beyond only pad.
    """
    graph = _Graph({name: weight.cpu() for name, weight in model.state_dict().items()})
    embedded = graph.add("Gather", graph.weight("encoder.weight"), "tokens")
    inputs, outputs = [_declare("tokens", TensorProto.INT64, "words", "batch")], []
    if isinstance(model.rnn, Transformer):
        output = _transformer(graph, model.rnn, embedded, model.encoder.embedding_dim)
    else:
        output = _recurrent(graph, model.rnn, embedded)
        shape = (model.rnn.num_layers, "batch", model.rnn.hidden_size)
        for name in _state(model.rnn):
            inputs.append(_declare(name, TensorProto.FLOAT, *shape))
            outputs.append(_declare(f"new_{name}", TensorProto.FLOAT, *shape))
    tied = model.decoder.weight is model.encoder.weight
    graph.linear(output, "encoder.weight" if tied else "decoder.weight", "decoder.bias", name="logits")
    outputs.insert(0, _declare("logits", TensorProto.FLOAT, "words", "batch", model.decoder.out_features))
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "language_model", inputs, outputs, list(graph.constants.values())),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="roundoff",
        producer_version=roundoff.__version__,
    )
    helper.set_model_props(proto, {"vocabulary": json.dumps(vocabulary), "options": json.dumps(model.options)})
    return proto


class _Graph:
    """Collects nodes in the order in which they run, and the constants that they take."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._weights = weights

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, and return that output's name: `name`, or one of its own."""
        name = name or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def add_many(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node with as many outputs, and return their names."""
        name = f"{operator.lower()}_{len(self.nodes)}"
        names = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name, **attributes))
        return names

    def constant(self, name: str, value: Tensor) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(value.detach().contiguous().numpy(), name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant("integers_" + "_".join(map(str, values)), torch.tensor(values))

    def number(self, value: float) -> str:
        return self.constant(f"number_{value}", torch.tensor(value))

    def weight(self, name: str) -> str:
        """Add a weight of the model's state_dict, as it is there; return its name."""
        return self.constant(name, self._weights[name])

    def linear(self, input: str, weight: str, bias: str, name: str | None = None) -> str:
        product = self.add("MatMul", input, self.add("Transpose", self.weight(weight), perm=[1, 0]))
        return self.add("Add", product, self.weight(bias), name=name)


def _declare(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _state(rnn: nn.RNNBase) -> list[str]:
    return ["hidden", "cell"] if rnn.mode == "LSTM" else ["hidden"]


def _recurrent(graph: _Graph, rnn: nn.RNNBase, input: str) -> str:
    """Add one node a layer, each with its own part of the state; return the output."""
    operator, _, activation = rnn.mode.partition("_")
    attributes: dict[str, Any] = {"hidden_size": rnn.hidden_size}
    if activation:
        attributes["activations"] = [activation.capitalize() if activation == "TANH" else "Relu"]
    if operator == "GRU":
        attributes["linear_before_reset"] = 1  # r multiplies h @ weight + bias, as in torch
    state, layers = _state(rnn), graph.integers(*[1] * rnn.num_layers)
    before = [graph.add_many("Split", name, layers, outputs=rnn.num_layers, axis=0) for name in state]
    after: list[list[str]] = [[] for _ in state]
    for layer, names in enumerate(zip(*before, strict=True)):
        weights = [_gates(rnn, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        w_x, w_h, bias = weights[0], weights[1], torch.cat(weights[2:])
        constants = [
            graph.constant(f"{operator}_{layer}_{name}", value[None])  # of one direction
            for name, value in (("W", w_x), ("R", w_h), ("B", bias))
        ]
        output, *new = graph.add_many(operator, input, *constants, "", *names, outputs=1 + len(state), **attributes)
        input = graph.add("Squeeze", output, graph.integers(1))
        for of_all, name in zip(after, new, strict=True):
            of_all.append(name)
    for name, of_all in zip(state, after, strict=True):
        graph.add("Concat", *of_all, name=f"new_{name}", axis=0)
    return input


def _gates(rnn: nn.RNNBase, name: str) -> Tensor:
    parts = rnn.get_parameter(name).detach().cpu().chunk(len(GATES[rnn.mode]))
    return torch.cat([parts[i] for i in GATES[rnn.mode]])


def _transformer(graph: _Graph, layers: Transformer, embedded: str, emsize: int) -> str:
    words = graph.add("Gather", graph.add("Shape", "tokens"), graph.constant("first", torch.tensor(0)))
    zero, one = graph.constant("zero", torch.tensor(0)), graph.constant("one", torch.tensor(1))
    places = graph.add("Range", zero, words, one)
    column = graph.add("Unsqueeze", places, graph.integers(1))
    sees = graph.add("GreaterOrEqual", column, places)  # shape (words, words): no later word
    scaled = graph.add("Mul", embedded, graph.number(math.sqrt(emsize)))
    x = graph.add("Add", scaled, _positions(graph, column, emsize))
    for i in range(layers.num_layers):
        x = _transformer_layer(graph, f"rnn.layers.{i}", layers.layers[i], x, sees)
    return x


def _positions(graph: _Graph, column: str, emsize: int) -> str:
    """Add what `lm.model.transformer.positions` computes, shape (words, 1, emsize)."""
    twice = graph.constant("frequencies", frequencies(emsize).repeat_interleave(2)[:emsize])
    angle = graph.add("Mul", graph.add("Cast", column, to=TensorProto.FLOAT), twice)
    is_even = graph.constant("is_even", torch.arange(emsize) % 2 == 0)
    interleaved = graph.add("Where", is_even, graph.add("Sin", angle), graph.add("Cos", angle))
    return graph.add("Unsqueeze", interleaved, graph.integers(1))


def _transformer_layer(graph: _Graph, name: str, layer: nn.TransformerEncoderLayer, x: str, sees: str) -> str:
    def norm(part: str, of: str, epsilon: float) -> str:
        weights = graph.weight(f"{name}.{part}.weight"), graph.weight(f"{name}.{part}.bias")
        return graph.add("LayerNormalization", of, *weights, epsilon=epsilon)

    def linear(part: str, of: str) -> str:
        return graph.linear(of, f"{name}.{part}.weight", f"{name}.{part}.bias")

    x = norm("norm1", graph.add("Add", x, _attention(graph, name, layer.self_attn, x, sees)), layer.norm1.eps)
    fed = linear("linear2", graph.add("Relu", linear("linear1", x)))
    return norm("norm2", graph.add("Add", x, fed), layer.norm2.eps)


def _attention(graph: _Graph, name: str, attention: nn.MultiheadAttention, x: str, sees: str) -> str:
    """Add self-attention: (words, batch, emsize), as x; in between (batch, heads, words, size of a head)."""
    heads, size = attention.num_heads, attention.head_dim
    qkv = graph.linear(x, f"{name}.self_attn.in_proj_weight", f"{name}.self_attn.in_proj_bias")
    thirds = graph.add_many("Split", qkv, graph.integers(*[heads * size] * 3), outputs=3, axis=2)
    q, k, v = (graph.add("Reshape", part, graph.integers(0, 0, heads, size)) for part in thirds)  # 0: as it was
    q, v = (graph.add("Transpose", part, perm=[1, 2, 0, 3]) for part in (q, v))
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[1, 2, 3, 0]))
    scores = graph.add("Mul", scores, graph.number(1 / math.sqrt(size)))
    scores = graph.add("Where", sees, scores, graph.number(-math.inf))
    attended = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    attended = graph.add("Transpose", attended, perm=[2, 0, 1, 3])
    attended = graph.add("Reshape", attended, graph.integers(0, 0, heads * size))
    return graph.linear(attended, f"{name}.self_attn.out_proj.weight", f"{name}.self_attn.out_proj.bias")
