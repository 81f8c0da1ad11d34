"""The manual helpers, the converted networks and the standalone scalers."""

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
from fp16_cases import loss_of, mixed, mlp, problem, same, snapshot

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_training_by_hand_is_fp32_sgd_on_the_masters(dtype, flat):
    network = mlp(dtype)
    control = [p.detach().float() for p in network.parameters()]
    model_params, master_params = prep_param_lists(network, flat_master=flat)
    assert len(master_params) == (1 if flat else 4)
    assert all(isinstance(m, nn.Parameter) and m.dtype == torch.float32 for m in master_params)
    optimizer = torch.optim.SGD(master_params, lr=0.1)
    for i in range(3):
        network.zero_grad()
        (loss_of(network, *problem(i)) * 64.0).backward()
        for weight, param in zip(control, network.parameters(), strict=True):
            weight.sub_(0.1 / 64.0 * param.grad.float())
        model_grads_to_master_grads(model_params, master_params, flat_master=flat)
        for master in master_params:
            master.grad.mul_(1 / 64.0)
        optimizer.step()
        master_params_to_model_params(model_params, master_params, flat_master=flat)
    for weight, param in zip(control, network.parameters(), strict=True):
        assert torch.allclose(weight, param.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    parts = torch.cat([m.detach().flatten() for m in master_params])
    assert torch.equal(parts.to(dtype), torch.cat([p.detach().flatten() for p in network.parameters()]))


def test_the_two_layouts_agree():
    networks = [mlp(torch.float16), mlp(torch.float16)]
    flats = [False, True]
    for network, flat in zip(networks, flats, strict=True):
        model_params, masters = prep_param_lists(network, flat)
        optimizer = torch.optim.SGD(masters, lr=0.5, momentum=0.9)
        for i in range(3):
            network.zero_grad()
            loss_of(network, *problem(i)).backward()
            model_grads_to_master_grads(model_params, masters, flat)
            optimizer.step()
            master_params_to_model_params(model_params, masters, flat)
    assert same(snapshot(networks[0]), snapshot(networks[1]))


def test_masters_of_fp32_parameters_are_copies():
    network = mlp()
    model_params, masters = prep_param_lists(network)
    with torch.no_grad():
        masters[0].add_(1.0)
    assert not torch.equal(masters[0], model_params[0])


def test_frozen_and_tied_parameters():
    network = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    network["b"].weight = network["a"].weight
    network["c"] = nn.Linear(1, 1)
    network["c"].requires_grad_(False)
    model_params, masters = prep_param_lists(network.half())
    assert len(model_params) == len(masters) == 1


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
    with pytest.raises(TypeError, match="sparse"):
        model_grads_to_master_grads(model_params, prep_param_lists(network, True)[1], flat_master=True)


def test_bad_lists_are_refused():
    network = mlp(torch.float16)
    model_params, masters = prep_param_lists(network)
    _, flat = prep_param_lists(network, flat_master=True)
    for function in (model_grads_to_master_grads, master_params_to_model_params):
        with pytest.raises(ValueError, match="master_params"):
            function(model_params, masters[1:])
        with pytest.raises(ValueError, match="master_params"):
            function(model_params, flat)
        with pytest.raises(ValueError, match="flat master"):
            function(model_params, masters, flat_master=True)
    with pytest.raises(TypeError, match="float64"):
        prep_param_lists(nn.Linear(1, 1).double())
    with pytest.raises(ValueError, match="requires grad"):
        prep_param_lists(nn.Linear(1, 1).requires_grad_(False))


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4, affine=False))
    )


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
    out = converted(x if convert is not convert_network and isinstance(converted, FP16Model) else x.half())
    assert out.dtype == torch.float16
    assert torch.allclose(out.float(), control(x), atol=0.02)
    out.float().sum().backward()
    assert network[1].weight.grad.dtype == torch.float32


def test_network_to_half_and_model_cast_their_inputs():
    x = torch.randn(2, 4)
    assert network_to_half(mlp())(x).dtype == torch.float16
    assert isinstance(network_to_half(mlp())[0], tofp16)
    assert FP16Model(mlp())(x).dtype == torch.float16
    assert FP16Model(nn.Embedding(3, 2))(torch.tensor([1])).dtype == torch.float16
    pixels = torch.randint(256, (2, 4), dtype=torch.uint8)
    assert torch.equal(FP16Model(mlp())(pixels), mlp().half()(pixels.half()))
    assert FP16Model(nn.Identity())(torch.tensor([True])).dtype == torch.bool
    assert tofp16()(x).dtype == torch.float16


def test_batch_norm_back_to_float():
    network = convolution().half()
    assert BN_convert_float(network) is network
    assert dtypes(network)["1.running_var"] == torch.float32
    assert dtypes(network)["3.0.running_var"] == dtypes(network)["0.weight"] == torch.float16


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
    with pytest.raises(TypeError, match="int32"):
        convert_network(network, torch.int32)


def test_to_python_float():
    assert to_python_float(torch.tensor([2.5])) == 2.5
    assert to_python_float([1.5]) == 1.5


def test_clip_grad_norm_is_torchs():
    assert fp16_utils.clip_grad_norm is torch.nn.utils.clip_grad_norm_


@pytest.mark.parametrize("scaler", [LossScaler(64), DynamicLossScaler(init_scale=64)])
def test_scalers_scale(scaler):
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler.backward(weight.sum(), retain_graph=False)
    assert weight.grad.tolist() == [64.0, 64.0]
    scaled = scaler.scale_gradient(None, (torch.ones(1), None), None)
    assert scaled[0].item() == 64.0
    assert scaled[1] is None
    assert scaler.loss_scale == 64.0


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1.0])
def test_has_overflow(bad, dtype):
    params = [nn.Parameter(torch.zeros(4, dtype=dtype)) for _ in range(3)]
    params[2].grad = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)  # a sum of these overflows, they do not
    params[1].grad = torch.ones(4, dtype=dtype)
    params[1].grad[3] = bad
    assert DynamicLossScaler().has_overflow(params) == (bad != 1.0)
    assert not LossScaler().has_overflow(params)
    assert not DynamicLossScaler().has_overflow([])


def test_a_static_scaler_ignores_updates():
    scaler = LossScaler(8.0)
    scaler.update_scale(True)
    assert scaler.loss_scale == 8.0


def test_public_names_and_signatures():
    assert set(fp16_utils.__all__) == {
        *("FP16_Optimizer", "LossScaler", "DynamicLossScaler", "prep_param_lists", "clip_grad_norm"),
        *("model_grads_to_master_grads", "master_params_to_model_params", "to_python_float", "tofp16"),
        *("BN_convert_float", "network_to_half", "convert_module", "convert_network", "FP16Model"),
        *("LARGEST_SCALE", "SMALLEST_SCALE", "fused"),
    }
    optimizer = fp16_utils.FP16_Optimizer
    signatures = {
        optimizer: "init_optimizer, static_loss_scale=1.0, dynamic_loss_scale=False, dynamic_loss_args=None, "
        "verbose=True, check_overflow=True",
        optimizer.backward: "self, loss, update_master_grads=True, retain_graph=False",
        optimizer.update_master_grads: "self",
        optimizer.clip_master_grads: "self, max_norm, norm_type=2",
        optimizer.inspect_master_grad_data: "self",
        optimizer.step: "self, closure=None",
        optimizer.zero_grad: "self, set_grads_to_None=False, set_to_none=None",
        optimizer.load_state_dict: "self, state_dict",
        LossScaler: "scale=1",
        DynamicLossScaler: "init_scale=4294967296, scale_factor=2.0, scale_window=1000",
        DynamicLossScaler.has_overflow: "self, params",
        DynamicLossScaler.update_scale: "self, overflow",
        DynamicLossScaler.backward: "self, loss, retain_graph=False",
        DynamicLossScaler.scale_gradient: "self, module, grad_in, grad_out",
        prep_param_lists: "model, flat_master=False",
        model_grads_to_master_grads: "model_params, master_params, flat_master=False",
        master_params_to_model_params: "model_params, master_params, flat_master=False",
        convert_network: "network, dtype",
    }
    for function, expected in signatures.items():
        parameters = inspect.signature(function).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert ", ".join(str(p) for p in bare) == expected
    for name in fp16_utils.__all__[2:]:
        assert getattr(fp16_utils, name).__doc__
