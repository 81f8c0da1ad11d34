"""apex_compat's mlp, fused_dense, RNN and not_offered: plain compositions, and a line for what is missing.

The signatures of optimizers and norms are here too.
"""

import inspect
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apex_compat import RNN, amp_C, fused_dense, normalization, not_offered, optimizers
from apex_compat.mlp import MLP
from apex_compat.normalization import fused_layer_norm

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_linear_layers_with_an_activation_each(activation, bias):
    torch.manual_seed(1)
    module, x = MLP([4, 6, 3], bias=bias, activation=activation), torch.randn(5, 4)
    names = ["weight_0", "bias_0", "weight_1", "bias_1"]
    assert set(module.state_dict()) == {name for name in names if bias or name.startswith("weight")}
    assert [tuple(w.shape) for w in module.weights] == [(6, 4), (3, 6)]
    wanted = x
    for i in range(2):
        wanted = wanted @ module.weights[i].T + (module.biases[i] if bias else 0)
        wanted = ACTIVATIONS[activation](wanted)
    torch.testing.assert_close(module(x), wanted)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    deviation = MLP([400, 200], bias=bias).weights[0].std().item()
    assert deviation == pytest.approx((2 / 600) ** 0.5, rel=0.05)


def test_fused_dense_is_linear_layers_with_gelu_by_tanh():
    torch.manual_seed(2)
    x = torch.randn(5, 4)
    for bias in (True, False):
        module = fused_dense.FusedDense(4, 3, bias=bias)
        assert set(module.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
        torch.testing.assert_close(module(x), x @ module.weight.T + (module.bias if bias else 0))
    module = fused_dense.FusedDenseGeluDense(4, 6, 3)
    assert set(module.state_dict()) == {"weight1", "bias1", "weight2", "bias2"}
    h = x @ module.weight1.T + module.bias1
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    wanted = h @ module.weight2.T + module.bias2
    torch.testing.assert_close(module(x), wanted)
    weights = (module.weight1, module.bias1, module.weight2, module.bias2)
    torch.testing.assert_close(fused_dense.fused_dense_gelu_dense_function(x, *weights), wanted)
    torch.testing.assert_close(fused_dense.fused_dense_function(h, *weights[2:]), wanted)
    torch.testing.assert_close(fused_dense.dense_no_bias_function(h, module.weight2), wanted - module.bias2)


@pytest.mark.parametrize(("name", "layer"), [
    ("LSTM", nn.LSTM), ("GRU", nn.GRU), ("ReLU", partial(nn.RNN, nonlinearity="relu")), ("Tanh", nn.RNN),
])  # fmt: skip
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rnns_go_on_from_their_last_hidden_state(name, layer, bidirectional):
    torch.manual_seed(3)
    module = getattr(RNN, name)(4, 3, 2, bidirectional=bidirectional)
    plain = layer(4, 3, 2, bidirectional=bidirectional)
    plain.load_state_dict(module.rnn.state_dict())
    first, second, wider = torch.randn(5, 2, 4), torch.randn(6, 2, 4), torch.randn(5, 3, 4)
    whole, _ = plain(torch.cat([first, second]))
    outputs = [module(first)[0], module(second)[0]]
    if not bidirectional:  # backwards there is no whole
        torch.testing.assert_close(torch.cat(outputs), whole)
    torch.testing.assert_close(outputs[1], plain(second, plain(first)[1])[0])
    output, hidden = module(wider)  # another batch size begins anew
    wanted, state = plain(wider)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(hidden, state if name == "LSTM" else (state,))
    module.detach_hidden()
    assert not any(tensor.requires_grad for tensor in module.hidden)
    module.reset_hidden(3)
    torch.testing.assert_close(module(wider)[0], wanted)


NOT_OFFERED = [
    ("apex.contrib.xentropy", "apex.contrib.xentropy is not offered: use torch.nn.functional.cross_entropy"),
    ("apex.contrib.multihead_attn.SelfMultiheadAttn", "use torch.nn.functional.scaled_dot_product_attention"),
    ("apex.contrib.never_heard_of", "apex.contrib.never_heard_of is not offered: use NVIDIA's apex"),
    ("apex.transformer.tensor_parallel.layers", "use Megatron-Core"),
    (
        "contrib.optimizers.distributed_fused_adam",
        "apex.contrib.optimizers.distributed_fused_adam is not offered: use torch",
    ),
]


@pytest.mark.parametrize(("name", "line"), NOT_OFFERED)
def test_what_is_not_offered_says_what_to_use(name, line):
    with pytest.raises(ModuleNotFoundError, match=re.escape(line)) as caught:
        not_offered.refuse(name)
    assert "\n" not in str(caught.value)


def test_what_is_offered_or_unheard_of_is_not_refused():
    for name in ("apex.amp", "apex.optimizers.FusedAdam", "apex.normalization", "apex.contribution"):
        assert not_offered.refuse(name) is None


@pytest.mark.parametrize(("call", "kind", "line"), [
    (lambda: MLP([2, 3], activation="gelu"), TypeError, "activation is 'gelu'; it must be one of none, relu, sigmoid"),
    (lambda: fused_dense.FusedDenseGeluDense(2, 3, 4, bias=False), ValueError, "leave out bias=False"),
    (lambda: RNN.mLSTM(2, 3, 4), NotImplementedError, "apex.RNN.mLSTM is not offered"),
    (lambda: RNN.LSTM(2, 3, 1, output_size=2), NotImplementedError, "LSTM(output_size=...) is not offered"),
])  # fmt: skip
def test_mistakes_are_one_line(call, kind, line):
    with pytest.raises(kind, match=re.escape(line)):
        call()


BETAS = "betas=(0.9, 0.999)"
OPS = "chunk_size, noop_flag, tensor_lists"
SIGNATURES = [
    (optimizers.FusedAdam, f"params, lr=0.001, bias_correction=True, {BETAS}, eps=1e-08, adam_w_mode=True, "
     "weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False"),
    (optimizers.FusedAdam.step, "self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, "
     "grad_scaler=None"),
    (optimizers.FusedLAMB, f"params, lr=0.001, bias_correction=True, {BETAS}, eps=1e-06, weight_decay=0.01, "
     "amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False"),
    (optimizers.FusedSGD, "params, lr=<required parameter>, momentum=0.0, dampening=0.0, weight_decay=0.0, "
     "nesterov=False, wd_after_momentum=False, materialize_master_grads=True, set_grad_none=False"),
    (optimizers.FusedNovoGrad, f"params, lr=0.001, bias_correction=True, {BETAS}, eps=1e-08, weight_decay=0.0, "
     "amsgrad=False, reg_inside_moment=False, grad_averaging=True, norm_type=2, init_zero=False, set_grad_none=True"),
    (optimizers.FusedAdagrad, "params, lr=0.01, eps=1e-10, weight_decay=0.0, set_grad_none=True, adagrad_w_mode=False"),
    *[(getattr(normalization, name), "normalized_shape, eps=1e-05, elementwise_affine=True, memory_efficient=False")
      for name in ("FusedLayerNorm", "FusedRMSNorm")],
    *[(getattr(normalization, name), "normalized_shape, eps=1e-05, *, memory_efficient=False, elementwise_affine=None")
      for name in ("MixedFusedLayerNorm", "MixedFusedRMSNorm")],
    (fused_layer_norm.fused_layer_norm, "input, normalized_shape, eps=1e-06, memory_efficient=False"),
    *[(getattr(fused_layer_norm, f"{mixed}fused_{name}_affine"),
       f"input, weight, {bias}normalized_shape, eps=1e-06, memory_efficient=False")
      for mixed in ("", "mixed_dtype_") for name, bias in (("layer_norm", "bias, "), ("rms_norm", ""))],
    (fused_layer_norm.manual_rms_norm, "input, normalized_shape, weight, eps"),
    (MLP, "mlp_sizes, bias=True, activation='relu'"),
    (fused_dense.FusedDense, "in_features, out_features, bias=True"),
    (fused_dense.FusedDenseGeluDense, "in_features, intermediate_features, out_features, bias=True"),
    (amp_C.multi_tensor_scale, f"{OPS}, scale"),
    (amp_C.multi_tensor_axpby, f"{OPS}, a, b, arg_to_check=-1"),
    (amp_C.multi_tensor_l2norm, f"{OPS}, per_tensor=False"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "signature"), SIGNATURES, ids=[call.__name__ for call, _ in SIGNATURES])
def test_signatures_are_apexs(call, signature):
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(call).parameters.values()]
    assert str(inspect.Signature(bare)) == f"({signature})"
