"""Bad input: the message names the argument and the value, and nothing has changed."""

import re

import pytest
import torch
from torch import nn

from apex_compat.fp16_utils import (
    DynamicLossScaler,
    LossScaler,
    convert_network,
    master_params_to_model_params,
    model_grads_to_master_grads,
    prep_param_lists,
)
from fp16_cases import INF, NAN, loss_of, mixed, mlp, problem, same, snapshot, wrap

UNFIT = [  # value, error: of any loss scale
    *[(value, ValueError) for value in (0, -1.0, NAN, INF, 1e-40, 1e39)],
    *[(value, TypeError) for value in ("128", None, True)],
]
DYNAMIC_ARGS = [
    ([1], TypeError, r"dynamic_loss_args is \[1\]; it must be None or a dict"),
    ({"scale": 2}, ValueError, "dynamic_loss_args has the key 'scale'.*scale_window"),
    ({"init_scale": 0}, ValueError, "init_scale is 0"),
    ({"init_scale": "big"}, TypeError, "init_scale is 'big'"),
    ({"scale_factor": 1.0}, ValueError, "scale_factor is 1.0; .* greater than 1"),
    ({"scale_factor": NAN}, ValueError, "scale_factor is nan"),
    ({"scale_factor": "2"}, TypeError, "scale_factor is '2'"),
    ({"scale_window": 0}, ValueError, "scale_window is 0; it must be at least 1"),
    ({"scale_window": 1.5}, TypeError, "scale_window is 1.5; it must be an int"),
    ({"min_loss_scale": 0.0}, ValueError, "min_loss_scale is 0.0"),
    ({"max_loss_scale": INF}, ValueError, "max_loss_scale is inf"),
    ({"min_loss_scale": 8, "max_loss_scale": 4}, ValueError, "min_loss_scale is 8"),
]
CONSTRUCTION = [
    *[
        ({"static_loss_scale": v}, error, re.escape(f"static_loss_scale is {v!r}; it must be a finite number"))
        for v, error in UNFIT
    ],
    *[({"dynamic_loss_scale": True, "dynamic_loss_args": args}, *expected) for args, *expected in DYNAMIC_ARGS],
    ({"dynamic_loss_scale": True, "check_overflow": False}, ValueError, "check_overflow is False"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), CONSTRUCTION, ids=lambda v: str(v)[:40])
def test_bad_arguments_leave_the_optimizer_alone(kwargs, error, message):
    network = mlp(torch.float16)
    inner = torch.optim.SGD(network.parameters(), lr=0.1)
    before = list(inner.param_groups[0]["params"])
    with pytest.raises(error, match=message):
        wrap(inner, **kwargs)
    assert all(a is b for a, b in zip(before, inner.param_groups[0]["params"], strict=True))


def test_dynamic_arguments_are_ignored_under_a_static_scale():
    # As apex did: scripts pass both and choose by a flag.
    wrap(torch.optim.SGD(mlp().parameters(), lr=0.1), dynamic_loss_args={"scale_window": 7})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused_before_anything_changes(dtype):
    half, other = (nn.Parameter(torch.ones(1, dtype=d)) for d in (torch.float16, dtype))
    inner = torch.optim.SGD([{"params": [half]}, {"params": [other]}], lr=0.1)
    with pytest.raises(TypeError, match=f"init_optimizer has a parameter of {dtype}; allowed are float16"):
        wrap(inner)
    assert inner.param_groups[0]["params"] == [half]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_bad_scale_cannot_be_set(dynamic):
    optimizer = wrap(torch.optim.SGD(mlp().parameters(), lr=0.1), dynamic_loss_scale=dynamic)
    before = optimizer.loss_scale
    for value, error in UNFIT:
        with pytest.raises(error, match=re.escape(f"loss_scale is {value!r}")):
            optimizer.loss_scale = value
        assert optimizer.loss_scale == before


def sgd():
    return torch.optim.SGD(mlp().parameters(), lr=0.1)


def lists(flat=False, keep=slice(None)):
    model_params, masters = prep_param_lists(mlp(torch.float16), flat)
    return model_params, masters[keep]


def sparse_into_flat():
    network = nn.Embedding(3, 2, sparse=True).half()
    network(torch.tensor([1, 1])).float().sum().backward()
    model_grads_to_master_grads(*prep_param_lists(network, True), flat_master=True)


VECTOR, CONSTANT = torch.ones(2, requires_grad=True), torch.ones(())
SCALERS = {"FP16_Optimizer": lambda: wrap(sgd()), "LossScaler": LossScaler, "DynamicLossScaler": DynamicLossScaler}
CALLS = [
    (lambda: wrap([nn.Parameter(torch.ones(1))]), TypeError, "init_optimizer is a list"),
    (lambda: wrap(wrap(sgd())), TypeError, "init_optimizer is a FP16_Optimizer"),
    (lambda: wrap(torch.optim.SGD([{"params": []}], lr=0.1)), ValueError, "init_optimizer has no parameters"),
    (lambda: LossScaler(0), ValueError, "scale is 0"),
    (lambda: LossScaler("1"), TypeError, "scale is '1'"),
    (lambda: DynamicLossScaler(init_scale=NAN), ValueError, "init_scale is nan"),
    (lambda: DynamicLossScaler(scale_factor=0.5), ValueError, "scale_factor is 0.5"),
    (lambda: DynamicLossScaler(scale_window=-1), ValueError, "scale_window is -1"),
    (lambda: prep_param_lists(nn.Linear(1, 1).double()), TypeError, "float64"),
    (lambda: prep_param_lists(nn.Linear(1, 1).requires_grad_(False)), ValueError, "requires grad"),
    (lambda: convert_network(mlp(), torch.int32), TypeError, "int32"),
    (sparse_into_flat, TypeError, "sparse"),
    *[
        (lambda function=function, args=args: function(*args()), ValueError, message)
        for function in (model_grads_to_master_grads, master_params_to_model_params)
        for args, message in (
            (lambda: lists(keep=slice(1, None)), "master_params"),
            (lambda: lists(flat=True), "master_params"),
            (lambda: (*lists(), True), "flat master"),
        )
    ],
    *[
        (lambda make=make, loss=loss: make().backward(loss), error, message)
        for make in SCALERS.values()
        for loss, error, message in (
            (1.0, TypeError, "loss is a float"),
            (VECTOR, ValueError, r"loss has shape \(2,\)"),
            (CONSTANT, ValueError, "requires_grad=False"),
            (CONSTANT.long(), ValueError, "dtype torch.int64"),
        )
    ],
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[f"{i} {row[2]}" for i, row in enumerate(CALLS)])
def test_a_bad_call_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((-1.0,), ValueError, "max_norm is -1.0; it must be a number of at least 0"),
        ((NAN,), ValueError, "max_norm is nan"),
        (("1",), TypeError, "max_norm is '1'"),
        ((1.0, 0), ValueError, "norm_type is 0; it must be a number greater than 0"),
        ((1.0, "two"), TypeError, "norm_type is 'two'"),
    ],
)
def test_a_bad_norm_changes_no_gradient(args, error, message):
    network = mixed()
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.1))
    optimizer.backward(loss_of(network, *problem()))
    before = snapshot(optimizer.inspect_master_grad_data())
    with pytest.raises(error, match=message):
        optimizer.clip_master_grads(*args)
    assert same(before, snapshot(optimizer.inspect_master_grad_data()))


def test_steps_in_the_wrong_order_are_refused():
    network = mixed()
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), static_loss_scale=64.0)
    before = snapshot(network, optimizer)

    def refused():
        for call, name in ((optimizer.step, "step"), (lambda: optimizer.clip_master_grads(1.0), "clip_master_grads")):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) was called before backward\(\)"):
                call()

    refused()
    optimizer.backward(loss_of(network, *problem()), update_master_grads=False)
    refused()
    with pytest.raises(RuntimeError, match="inspect_master_grad_data"):
        optimizer.inspect_master_grad_data()
    assert same(before, snapshot(network, optimizer))
    optimizer.update_master_grads()
    optimizer.step()
    refused()  # the same gradients again
    assert optimizer.inspect_master_grad_data() is not None  # though they can still be looked at
    optimizer.backward(loss_of(network, *problem()))
    optimizer.zero_grad()
    refused()
