"""The loss scale against pure-Python models of the policies, over random overflow patterns."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apex_compat import fp16_utils
from fp16_cases import INF, wrap

PATTERNS = st.lists(st.booleans(), max_size=30)
FACTORS = st.sampled_from([2.0, 4.0, 1.5, 3.0, 1.001])
WINDOWS = st.integers(1, 6)
SCALES = st.sampled_from([2.0**16, 2.0**24, 1.0, 100.0, 0.1, 3.7e6, 2.0**-99, 2.0**126])
BOUNDS = st.sampled_from([None, 2.0**-100, 0.3, 1.0, 128.0])
CEILINGS = st.sampled_from([128.0, 1e5, 2.0**24, 2.0**127])
few = settings(deadline=None, database=None, max_examples=60)


def fp32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


class StaticModel:
    def __init__(self, scale):
        self.scale, self.good = fp32(scale), None

    def update(self, overflow):
        pass


class DynamicModel:
    """The policy that apex.amp's scaler really ran, in Python's own numbers rounded to fp32."""

    def __init__(self, init, factor, window, smallest, largest):
        self.factor, self.window = fp32(factor), window
        self.smallest = fp32(2.0**-100 if smallest is None else smallest)
        self.largest = fp32(largest)
        self.scale = min(max(fp32(init), self.smallest), self.largest)
        self.good = 0

    def update(self, overflow):
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale = max(fp32(self.scale / self.factor), self.smallest)
        elif self.good == self.window:
            self.good = 0
            self.scale = min(fp32(min(self.scale * self.factor, 3e38)), self.largest)


class OldDynamicModel:
    """The policy of the exported class DynamicLossScaler: minimum 1, growth at multiples of the window."""

    def __init__(self, init, factor, window):
        self.scale, self.factor, self.window, self.good = init, factor, window, 0

    def update(self, overflow):
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.scale = max(self.scale / self.factor, 1.0)
        elif self.good % self.window == 0:
            self.scale = min(self.scale * self.factor, 2.0**127)


class Subject:
    """One weight and its optimizer; an update has a gradient of 1, or an overflow."""

    def __init__(self, *, init=None, factor=None, window=None, smallest=None, largest=None, lr=1.0, **kwargs):
        args = {"init_scale": init, "scale_factor": factor, "scale_window": window}
        args |= {"min_loss_scale": smallest, "max_loss_scale": largest}
        given = {key: value for key, value in args.items() if value is not None}
        self.weight = nn.Parameter(torch.zeros(1))
        kwargs = kwargs or {"dynamic_loss_scale": True, "dynamic_loss_args": given}
        self.optimizer = wrap(torch.optim.SGD([self.weight], lr=lr), **kwargs)

    def update(self, overflow):
        self.optimizer.zero_grad()
        self.optimizer.backward(self.weight.sum() * (INF if overflow else 1.0))
        return self.optimizer.loss_scale

    def follow(self, model, pattern):
        """Assert that the optimizer does what `model` says, at each of the updates."""
        optimizer = self.optimizer
        assert optimizer.loss_scale == model.scale
        for overflow in pattern:
            weight, read_before, scale_before = self.weight.item(), optimizer.loss_scale_tensor, model.scale
            model.update(overflow)
            assert self.update(overflow) == model.scale
            assert optimizer.overflow == overflow
            assert optimizer.found_inf.item() == float(overflow)
            assert optimizer.loss_scale_tensor.item() == model.scale
            assert read_before.item() == scale_before
            assert optimizer.state_dict()["loss_scaler"].get("good_updates") == model.good
            optimizer.step()
            assert (self.weight.item() == weight) == overflow


@few
@given(PATTERNS, SCALES, FACTORS, WINDOWS, BOUNDS, CEILINGS)
def test_a_dynamic_scale_follows_its_policy(pattern, init, factor, window, smallest, largest):
    subject = Subject(init=init, factor=factor, window=window, smallest=smallest, largest=largest)
    subject.follow(DynamicModel(init, factor, window, smallest, largest), pattern)


@few
@given(PATTERNS, SCALES)
def test_a_static_scale_stays_and_skips(pattern, scale):
    Subject(static_loss_scale=scale).follow(StaticModel(scale), pattern)


@few
@given(PATTERNS, SCALES, FACTORS, WINDOWS)
def test_the_exported_dynamic_scaler_follows_its_own_policy(pattern, init, factor, window):
    scaler = fp16_utils.DynamicLossScaler(init_scale=init, scale_factor=factor, scale_window=window)
    model = OldDynamicModel(init, factor, window)
    for overflow in pattern:
        scaler.update_scale(overflow)
        model.update(overflow)
        assert scaler.loss_scale == model.scale


def test_defaults_are_those_that_ran():
    subject = Subject()
    state = subject.optimizer.state_dict()
    assert state["loss_scaler"] == {
        "loss_scale": 2.0**16,
        "good_updates": 0,
        "scale_factor": 2.0,
        "scale_window": 2000,
        "min_loss_scale": None,
        "max_loss_scale": 2.0**24,
    }
    # The last updates of the first window, and one after it.
    state["loss_scaler"]["good_updates"] = 1997
    subject.optimizer.load_state_dict(state)
    assert [subject.update(overflow) for overflow in (False, False, False, True)] == [2.0**k for k in (16, 16, 17, 16)]
    old = fp16_utils.DynamicLossScaler()
    assert (old.loss_scale, old.scale_factor, old.scale_window) == (2.0**32, 2.0, 1000)
    assert fp16_utils.LossScaler().loss_scale == 1.0


def test_many_skips_do_not_sink_the_scale_for_good():
    subject = Subject(window=1, factor=16.0)
    assert [subject.update(True) for _ in range(60)][-1] == 2.0**-100
    assert [subject.update(False) for _ in range(29)][-1] == 2.0**16


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 3_000_000_000, 2**32])
def test_a_window_that_is_never_full(window):
    """Beyond int32, in which updates are counted, it would be another number."""
    subject = Subject(init=8.0, window=window)
    assert [subject.update(overflow) for overflow in (False, False, True, False)] == [8.0, 8.0, 4.0, 4.0]


@pytest.mark.parametrize("kwargs", [{"static_loss_scale": 8.0}, {"dynamic_loss_scale": True}], ids=str)
def test_the_scale_can_be_set(kwargs):
    subject = Subject(**kwargs)
    before = subject.optimizer.loss_scale_tensor
    kept = before.item()
    subject.optimizer.loss_scale = 64
    assert subject.optimizer.loss_scale == 64.0
    assert before.item() == kept
    assert subject.update(False) == 64.0
    assert subject.weight.grad.item() == 1.0
