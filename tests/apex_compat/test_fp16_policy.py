"""The loss scale against pure-Python models of the policies, over random overflow patterns."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apex_compat import fp16_utils
from fp16_cases import wrap

PATTERNS = st.lists(st.booleans(), max_size=40)
FACTORS = st.sampled_from([2.0, 4.0, 1.5, 3.0, 1.001])
WINDOWS = st.integers(1, 6)
SCALES = st.sampled_from([2.0**16, 2.0**24, 1.0, 100.0, 0.1, 3.7e6, 2.0**-99, 2.0**126])
BOUNDS = st.sampled_from([None, 2.0**-100, 0.3, 1.0, 128.0])
CEILINGS = st.sampled_from([128.0, 1e5, 2.0**24, 2.0**127])


def fp32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


class DynamicModel:
    """The policy that apex.amp's scaler really ran, in Python's own numbers rounded to fp32."""

    def __init__(self, init, factor, window, smallest, largest):
        self.factor, self.window = fp32(factor), window
        self.smallest = fp32(2.0**-100 if smallest is None else smallest)
        self.largest = fp32(largest)
        self.scale = min(max(fp32(init), self.smallest), self.largest)
        self.good = 0

    def update(self, overflow):
        if overflow:
            self.good = 0
            self.scale = max(fp32(self.scale / self.factor), self.smallest)
            return
        self.good += 1
        if self.good == self.window:
            self.good = 0
            self.scale = min(fp32(min(self.scale * self.factor, 3e38)), self.largest)


class OldDynamicModel:
    """The policy of the exported class DynamicLossScaler: minimum 1, growth at multiples of the window."""

    def __init__(self, init, factor, window):
        self.scale, self.factor, self.window = init, factor, window
        self.good = 0

    def update(self, overflow):
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale = max(self.scale / self.factor, 1.0)
        elif self.good % self.window == 0:
            self.scale = min(self.scale * self.factor, 2.0**127)


def one_update(optimizer, parameter, overflow):
    optimizer.zero_grad()
    optimizer.backward(parameter.sum() * (float("inf") if overflow else 1.0))


@settings(deadline=None, database=None, max_examples=80)
@given(PATTERNS, SCALES, FACTORS, WINDOWS, BOUNDS, CEILINGS)
def test_dynamic_scale_follows_the_policy(pattern, init, factor, window, smallest, largest):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(
        torch.optim.SGD([parameter], lr=1.0),
        dynamic_loss_scale=True,
        dynamic_loss_args={
            "init_scale": init,
            "scale_factor": factor,
            "scale_window": window,
            "min_loss_scale": smallest,
            "max_loss_scale": largest,
        },
    )
    model = DynamicModel(init, factor, window, smallest, largest)
    assert optimizer.loss_scale == model.scale
    for overflow in pattern:
        weight, scale_read_before = parameter.item(), (optimizer.loss_scale_tensor, model.scale)
        one_update(optimizer, parameter, overflow)
        model.update(overflow)
        assert optimizer.overflow == overflow
        assert optimizer.found_inf.item() == float(overflow)
        assert optimizer.loss_scale == model.scale
        assert optimizer.loss_scale_tensor.item() == model.scale
        assert scale_read_before[0].item() == scale_read_before[1]
        assert optimizer.state_dict()["loss_scaler"]["good_updates"] == model.good
        optimizer.step()
        assert (parameter.item() == weight) == overflow


@settings(deadline=None, database=None, max_examples=40)
@given(PATTERNS, SCALES)
def test_static_scale_stays_and_skips(pattern, scale):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), static_loss_scale=scale)
    for overflow in pattern:
        weight = parameter.item()
        one_update(optimizer, parameter, overflow)
        optimizer.step()
        assert optimizer.overflow == overflow
        assert (parameter.item() == weight) == overflow
        assert optimizer.loss_scale == fp32(scale)


@settings(deadline=None, database=None, max_examples=80)
@given(PATTERNS, SCALES, FACTORS, WINDOWS)
def test_the_exported_dynamic_scaler_follows_its_own_policy(pattern, init, factor, window):
    scaler = fp16_utils.DynamicLossScaler(init_scale=init, scale_factor=factor, scale_window=window)
    model = OldDynamicModel(init, factor, window)
    for overflow in pattern:
        scaler.update_scale(overflow)
        model.update(overflow)
        assert scaler.loss_scale == model.scale


def test_defaults_are_those_that_ran():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(torch.optim.SGD([parameter], lr=0.0), dynamic_loss_scale=True)
    assert optimizer.loss_scale == 2.0**16
    for i in range(2000):
        assert optimizer.loss_scale == 2.0**16, i
        one_update(optimizer, parameter, overflow=False)
    assert optimizer.loss_scale == 2.0**17
    one_update(optimizer, parameter, overflow=True)
    assert optimizer.loss_scale == 2.0**16
    old = fp16_utils.DynamicLossScaler()
    assert (old.loss_scale, old.scale_factor, old.scale_window) == (2.0**32, 2.0, 1000)
    assert fp16_utils.LossScaler().loss_scale == 1.0


def test_many_skips_do_not_sink_the_scale_for_good():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(
        torch.optim.SGD([parameter], lr=0.0),
        dynamic_loss_scale=True,
        dynamic_loss_args={"scale_window": 1, "scale_factor": 16.0},
    )
    for _ in range(60):
        one_update(optimizer, parameter, overflow=True)
    assert optimizer.loss_scale == 2.0**-100
    for _ in range(29):
        one_update(optimizer, parameter, overflow=False)
    assert optimizer.loss_scale == 2.0**16


def test_the_first_scale_is_moved_into_the_bounds():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(
        torch.optim.SGD([parameter], lr=0.0), dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 2**32}
    )
    assert optimizer.loss_scale == 2.0**24


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_scale_can_be_set(dynamic):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(torch.optim.SGD([parameter], lr=0.0), dynamic_loss_scale=dynamic)
    before = optimizer.loss_scale_tensor
    kept = before.item()
    optimizer.loss_scale = 64
    assert optimizer.loss_scale == 64.0
    assert before.item() == kept
    optimizer.backward(parameter.sum())
    assert optimizer.loss_scale == 64.0
    assert parameter.grad.item() == 1.0


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 3_000_000_000, 2**32])
def test_a_window_that_is_never_full(window):
    """Beyond int32, in which updates are counted, it would be another number."""
    parameter = nn.Parameter(torch.zeros(1))
    args = {"init_scale": 8.0, "scale_window": window}
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), dynamic_loss_scale=True, dynamic_loss_args=args)
    scales = []
    for overflow in (False, False, True, False):
        one_update(optimizer, parameter, overflow)
        scales.append(optimizer.loss_scale)
    assert scales == [8.0, 8.0, 4.0, 4.0]
