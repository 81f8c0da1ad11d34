"""The helpers for mixed precision by hand, the converted networks and the standalone scalers."""

import inspect

import pytest
import torch
from torch import nn

from apex_compat import fp16_utils
from apex_compat.fp16_utils import (
    BN_convert_float,
    DynamicLossScaler,
    FP16Model,
    LossScaler,
    convert_module,
    convert_network,
    master_params_to_model_params,
    model_grads_to_master_grads,
    network_to_half,
    prep_param_lists,
    to_python_float,
    tofp16,
)
from fp16_cases import DTYPES, INF, NAN, ByHand, Case, loss_of, mixed, mlp, problem, same, snapshot


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_with_the_helpers_is_the_loop_by_hand(dtype, flat):
    network, hand = mlp(dtype), ByHand(Case(lambda: mlp(dtype)), scale=64.0)
    model_params, masters = prep_param_lists(network, flat_master=flat)
    assert len(masters) == (1 if flat else 4)
    assert all(isinstance(m, nn.Parameter) and m.dtype == torch.float32 for m in masters)
    optimizer = torch.optim.SGD(masters, lr=0.1, momentum=0.9, nesterov=True)
    for i in range(3):
        network.zero_grad()
        (loss_of(network, *problem(i)) * 64.0).backward()
        model_grads_to_master_grads(model_params, masters, flat_master=flat)
        for master in masters:
            master.grad.mul_(1 / 64.0)
        optimizer.step()
        master_params_to_model_params(model_params, masters, flat_master=flat)
        hand.step(i)
    assert same(snapshot(network), snapshot(hand.network))
    parts, expected = (torch.cat([m.detach().flatten() for m in each]) for each in (masters, hand.masters))
    assert torch.equal(parts, expected)


def test_masters_of_fp32_parameters_are_copies():
    model_params, masters = prep_param_lists(mlp())
    with torch.no_grad():
        masters[0].add_(1.0)
    assert not torch.equal(masters[0], model_params[0])


def test_frozen_and_tied_parameters():
    network = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False), "c": nn.Linear(1, 1)})
    network["b"].weight = network["a"].weight
    network["c"].requires_grad_(False)
    assert [len(params) for params in prep_param_lists(network.half())] == [1, 1]


def test_missing_gradients():
    network = mixed()
    model_params, masters = prep_param_lists(network)
    _, flat = prep_param_lists(network, flat_master=True)
    model_grads_to_master_grads(model_params, flat, flat_master=True)
    assert flat[0].grad is None
    for value in (1.0, 2.0):
        network.zero_grad()
        model_params[1].grad = torch.full((5,), value, dtype=torch.float16)
        if value == 1.0:
            model_params[0].grad = torch.ones(5, 4, dtype=torch.float16)
        model_grads_to_master_grads(model_params, masters)
        model_grads_to_master_grads(model_params, flat, flat_master=True)
    assert masters[0].grad is None
    assert masters[1].grad.tolist() == [2.0] * 5
    assert flat[0].grad.tolist() == [0.0] * 20 + [2.0] * 5 + [0.0] * 18


def test_sparse_gradients():
    network = nn.Embedding(3, 2, sparse=True).half()
    model_params, masters = prep_param_lists(network)
    network(torch.tensor([1, 1])).float().sum().backward()
    model_grads_to_master_grads(model_params, masters)
    assert masters[0].grad.is_sparse
    assert masters[0].grad.to_dense().tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]


def convolution():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.BatchNorm2d(4, affine=False))
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), inner)


def dtypes(network):
    return {name: t.dtype for name, t in network.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("convert", [network_to_half, FP16Model, lambda n: convert_network(n, torch.float16)])
def test_affine_batch_norm_stays_in_fp32(convert):
    control, network = convolution(), convolution()
    converted = convert(network)
    found = dtypes(network)
    assert {found[f"1.{n}"] for n in ("weight", "bias", "running_mean", "running_var")} == {torch.float32}
    assert {d for n, d in found.items() if not n.startswith("1.")} == {torch.float16}
    x = torch.randn(8, 2, 5, 5)
    out = converted(x.half() if converted is network else x)
    assert out.dtype == torch.float16
    assert torch.allclose(out.float(), control(x), atol=0.02)
    out.float().sum().backward()
    assert network[1].weight.grad.dtype == torch.float32


def test_batch_norm_back_to_float():
    network = convolution().half()
    assert BN_convert_float(network) is network
    found = dtypes(network)
    assert found["1.running_var"] == torch.float32
    assert found["3.0.running_var"] == found["0.weight"] == torch.float16


def test_network_to_half_and_model_cast_their_inputs():
    x = torch.randn(2, 4)
    assert isinstance(network_to_half(mlp())[0], tofp16)
    for module, given in [
        (tofp16(), x),
        (network_to_half(mlp()), x),
        (FP16Model(mlp()), x),
        (FP16Model(nn.Embedding(3, 2)), torch.tensor([1])),
    ]:
        assert module(given).dtype == torch.float16
    pixels = torch.randint(256, (2, 4), dtype=torch.uint8)
    assert torch.equal(FP16Model(mlp())(pixels), mlp().half()(pixels.half()))
    for dtype in (torch.bool, torch.int32, torch.int64):
        assert FP16Model(nn.Identity())(torch.ones(1, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_converted_rnn_runs(cell):
    network = convert_network(cell(3, 4, 2), torch.bfloat16)
    out, _ = network(torch.randn(5, 2, 3).bfloat16())
    assert out.dtype == torch.bfloat16


def test_conversion_casts_gradients_keeps_ties_and_integers():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    network.register_buffer("count", torch.tensor(3))
    network(torch.ones(1, 2)).sum().backward()
    convert_network(network, torch.float16)
    assert network[0].weight is network[1].weight
    assert network[0].weight.grad.dtype == torch.float16
    assert network.count.dtype == torch.int64
    convert_module(network, torch.float64)  # its own tensors only: it has none but the integer
    assert network[0].weight.dtype == torch.float16


@pytest.mark.parametrize("scaler", [LossScaler(64), DynamicLossScaler(init_scale=64)])
def test_scalers_scale(scaler):
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler.backward(weight.sum(), retain_graph=False)
    assert weight.grad.tolist() == [64.0, 64.0]
    assert scaler.scale_gradient(None, (torch.ones(1), None), None) == (torch.tensor([64.0]), None)
    assert scaler.loss_scale == 64.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [INF, -INF, NAN, 1.0])
def test_has_overflow(bad, dtype):
    params = [nn.Parameter(torch.zeros(4, dtype=dtype)) for _ in range(3)]
    params[2].grad = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)  # a sum of these overflows, they do not
    params[1].grad = torch.ones(4, dtype=dtype)
    params[1].grad[3] = bad
    assert DynamicLossScaler().has_overflow(params) == (bad != 1.0)
    assert not DynamicLossScaler().has_overflow([])
    static = LossScaler(8.0)
    assert not static.has_overflow(params)
    static.update_scale(True)
    assert static.loss_scale == 8.0


SIGNATURES = {
    "FP16_Optimizer": "init_optimizer, static_loss_scale=1.0, dynamic_loss_scale=False, dynamic_loss_args=None, "
    "verbose=True, check_overflow=True",
    "FP16_Optimizer.backward": "self, loss, update_master_grads=True, retain_graph=False",
    "FP16_Optimizer.update_master_grads": "self",
    "FP16_Optimizer.clip_master_grads": "self, max_norm, norm_type=2",
    "FP16_Optimizer.inspect_master_grad_data": "self",
    "FP16_Optimizer.step": "self, closure=None",
    "FP16_Optimizer.zero_grad": "self, set_grads_to_None=False, set_to_none=None",
    "FP16_Optimizer.load_state_dict": "self, state_dict",
    "LossScaler": "scale=1",
    "DynamicLossScaler": "init_scale=4294967296, scale_factor=2.0, scale_window=1000",
    "DynamicLossScaler.has_overflow": "self, params",
    "DynamicLossScaler.update_scale": "self, overflow",
    "DynamicLossScaler.backward": "self, loss, retain_graph=False",
    "DynamicLossScaler.scale_gradient": "self, module, grad_in, grad_out",
    "prep_param_lists": "model, flat_master=False",
    "model_grads_to_master_grads": "model_params, master_params, flat_master=False",
    "master_params_to_model_params": "model_params, master_params, flat_master=False",
    "convert_network": "network, dtype",
    "convert_module": "module, dtype",
    "network_to_half": "network",
    "BN_convert_float": "module",
    "FP16Model": "network",
    "tofp16": "*args, **kwargs",
    "to_python_float": "t",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_apexs(name):
    function = fp16_utils
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters) == SIGNATURES[name]
    assert function.__doc__


def test_public_names():
    apexs = {name.partition(".")[0] for name in SIGNATURES} | {"clip_grad_norm"}
    assert set(fp16_utils.__all__) == apexs | {"LARGEST_SCALE", "SMALLEST_SCALE", "fused"}
    assert (fp16_utils.SMALLEST_SCALE, fp16_utils.LARGEST_SCALE) == (2.0**-100, 2.0**127)
    assert fp16_utils.clip_grad_norm is torch.nn.utils.clip_grad_norm_
    assert to_python_float(torch.tensor([2.5])) == 2.5
    assert to_python_float([1.5]) == 1.5
