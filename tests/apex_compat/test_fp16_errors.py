"""Bad input: the message names the argument and the value, and the optimizer is as it was."""

import re

import pytest
import torch
from torch import nn

from apex_compat import fp16_utils
from fp16_cases import loss_of, mixed, mlp, problem, same, snapshot, wrap

NAN, INF = float("nan"), float("inf")

BAD_ARGUMENTS = [
    ({"static_loss_scale": 0}, ValueError, "static_loss_scale is 0; it must be a finite number"),
    ({"static_loss_scale": -1.0}, ValueError, "static_loss_scale is -1.0"),
    ({"static_loss_scale": NAN}, ValueError, "static_loss_scale is nan"),
    ({"static_loss_scale": INF}, ValueError, "static_loss_scale is inf"),
    ({"static_loss_scale": 1e-40}, ValueError, "static_loss_scale is 1e-40"),
    ({"static_loss_scale": "128"}, TypeError, "static_loss_scale is '128'; it must be a finite number"),
    ({"static_loss_scale": None}, TypeError, "static_loss_scale is None"),
    ({"static_loss_scale": True}, TypeError, "static_loss_scale is True"),
    ({"dynamic_loss_args": [1]}, TypeError, r"dynamic_loss_args is \[1\]; it must be None or a dict"),
    ({"dynamic_loss_args": {"scale": 2}}, ValueError, "dynamic_loss_args has the key 'scale'.*scale_window"),
    ({"dynamic_loss_args": {"init_scale": 0}}, ValueError, "init_scale is 0"),
    ({"dynamic_loss_args": {"init_scale": "big"}}, TypeError, "init_scale is 'big'"),
    ({"dynamic_loss_args": {"scale_factor": 1.0}}, ValueError, "scale_factor is 1.0; .* greater than 1"),
    ({"dynamic_loss_args": {"scale_factor": NAN}}, ValueError, "scale_factor is nan"),
    ({"dynamic_loss_args": {"scale_factor": "2"}}, TypeError, "scale_factor is '2'"),
    ({"dynamic_loss_args": {"scale_window": 0}}, ValueError, "scale_window is 0; it must be at least 1"),
    ({"dynamic_loss_args": {"scale_window": 1.5}}, TypeError, "scale_window is 1.5; it must be an int"),
    ({"dynamic_loss_args": {"min_loss_scale": 0.0}}, ValueError, "min_loss_scale is 0.0"),
    ({"dynamic_loss_args": {"max_loss_scale": INF}}, ValueError, "max_loss_scale is inf"),
    ({"dynamic_loss_args": {"min_loss_scale": 8, "max_loss_scale": 4}}, ValueError, "min_loss_scale is 8"),
    ({"dynamic_loss_args": {}, "check_overflow": False}, ValueError, "check_overflow is False"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_ARGUMENTS, ids=lambda v: str(v)[:40])
def test_bad_arguments_leave_the_optimizer_alone(kwargs, error, message):
    network = mlp(torch.float16)
    inner = torch.optim.SGD(network.parameters(), lr=0.1)
    before = list(inner.param_groups[0]["params"])
    with pytest.raises(error, match=message):
        wrap(inner, dynamic_loss_scale="dynamic_loss_args" in kwargs, **kwargs)
    assert all(a is b for a, b in zip(before, inner.param_groups[0]["params"], strict=True))


def test_dynamic_arguments_are_ignored_under_a_static_scale():
    # As the original did: scripts pass both and choose by a flag.
    wrap(torch.optim.SGD(mlp().parameters(), lr=0.1), dynamic_loss_args={"scale_window": 7})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused_before_anything_changes(dtype):
    half, other = (nn.Parameter(torch.ones(1, dtype=d)) for d in (torch.float16, dtype))
    inner = torch.optim.SGD([{"params": [half]}, {"params": [other]}], lr=0.1)
    with pytest.raises(TypeError, match=f"init_optimizer has a parameter of {dtype}; allowed are float16"):
        wrap(inner)
    assert inner.param_groups[0]["params"] == [half]


def test_what_is_no_optimizer_to_wrap_is_refused():
    with pytest.raises(TypeError, match="init_optimizer is a list"):
        wrap([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="init_optimizer is a FP16_Optimizer"):
        wrap(wrap(torch.optim.SGD(mlp().parameters(), lr=0.1)))
    with pytest.raises(ValueError, match="init_optimizer has no parameters"):
        wrap(torch.optim.SGD([{"params": []}], lr=0.1))


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (NAN, ValueError), ("1", TypeError), (None, TypeError), (1e39, ValueError)],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_bad_scale_cannot_be_set(value, error, dynamic):
    optimizer = wrap(torch.optim.SGD(mlp().parameters(), lr=0.1), dynamic_loss_scale=dynamic)
    before = optimizer.loss_scale
    with pytest.raises(error, match=re.escape(f"loss_scale is {value!r}")):
        optimizer.loss_scale = value
    assert optimizer.loss_scale == before


def test_steps_in_the_wrong_order_are_refused():
    network = mixed()
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), static_loss_scale=64.0)
    before = snapshot(network, optimizer)

    def refused():
        for call, name in (
            (optimizer.step, "step"),
            (lambda: optimizer.clip_master_grads(1.0), "clip_master_grads"),
        ):
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


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (1.0, TypeError, "loss is a float"),
        (torch.ones(2, requires_grad=True), ValueError, r"loss has shape \(2,\)"),
        (torch.ones(()), ValueError, "requires_grad=False"),
        (torch.ones((), dtype=torch.int64), ValueError, "dtype torch.int64"),
    ],
)
def test_a_bad_loss_is_refused(loss, error, message):
    optimizer = wrap(torch.optim.SGD(mlp().parameters(), lr=0.1))
    for scaler in (optimizer, fp16_utils.LossScaler(), fp16_utils.DynamicLossScaler()):
        with pytest.raises(error, match=message):
            scaler.backward(loss)


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
def test_a_bad_norm_is_refused(args, error, message):
    network = mixed()
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.1))
    optimizer.backward(loss_of(network, *problem()))
    before = snapshot(optimizer.inspect_master_grad_data())
    with pytest.raises(error, match=message):
        optimizer.clip_master_grads(*args)
    assert same(before, snapshot(optimizer.inspect_master_grad_data()))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: fp16_utils.LossScaler(0), ValueError, "scale is 0"),
        (lambda: fp16_utils.LossScaler("1"), TypeError, "scale is '1'"),
        (lambda: fp16_utils.DynamicLossScaler(init_scale=NAN), ValueError, "init_scale is nan"),
        (lambda: fp16_utils.DynamicLossScaler(scale_factor=0.5), ValueError, "scale_factor is 0.5"),
        (lambda: fp16_utils.DynamicLossScaler(scale_window=-1), ValueError, "scale_window is -1"),
    ],
)
def test_scalers_refuse_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
