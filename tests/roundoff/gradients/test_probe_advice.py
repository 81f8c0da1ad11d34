"""Each sentence of advice, on results made up for it, with its figure in it."""

import copy

import pytest

from roundoff.gradients import advice
from roundoff.gradients.result import SHARES
from samples import KS, sample


def made_up(flushed_below: dict[str, int], overflow_from: dict[str, int], limit: float = 1e-3) -> dict:
    """A tensor flushes a tenth below its exponent and a millionth from there on; half overflows from the other on."""
    result = copy.deepcopy(sample())
    result["flush_limit"] = limit
    result["scales"]["predicted"] = {
        name: {
            "flushed": [0.1 if k < flushed_below[name] else 1e-6 for k in KS],
            "subnormal": [0.0] * len(KS),
            "overflowed": [0.5 if k >= overflow_from[name] else 0.0 for k in KS],
        }
        for name in flushed_below
    }
    return result


def sentences(result: dict, word: str) -> list[str]:
    return [sentence for sentence in advice.advise(result) if word in sentence]


def test_the_window_is_what_all_tensors_allow():
    result = made_up({"a": 2, "b": 5}, {"a": 30, "b": 18})
    assert advice.window(result) == {"low": 5, "high": 13}  # at 13 + 4 nothing overflows yet
    assert advice.take(result) == 9
    (sentence,) = sentences(result, "Static loss scales")
    assert "from 2**5 to 2**13 flush less than 0.001" in sentence
    assert "a factor of 16" in sentence
    assert "take 2**9 (512), where a has most flushed: 1e-06." in sentence
    (dynamic,) = sentences(result, "A dynamic loss scale")
    assert "settle at 2**17" in dynamic
    assert "2**18 costs a step" in dynamic


def test_a_window_of_one_scale():
    result = made_up({"a": 16, "b": 5}, {"a": 30, "b": 21})
    assert advice.window(result) == {"low": 16, "high": 16}
    (sentence,) = sentences(result, "static loss scale")
    assert "No static loss scale but 2**16 flushes less than 0.001 of every gradient" in sentence


def test_the_limit_is_the_users():
    assert advice.window(made_up({"a": 5}, {"a": 18}, limit=0.2)) == {"low": -8, "high": 13}
    assert advice.window(made_up({"a": 5}, {"a": 18}, limit=1e-6)) is None


def test_a_layer_to_be_kept_in_fp32():
    result = made_up({"a": 2, "logits": 16, "b": 20}, {"a": 16, "logits": 30, "b": 30})
    assert advice.window(result) is None
    assert advice.take(result) == 11
    (sentence,) = sentences(result, "No single scale serves")
    assert "keep logits (0.1), b (0.1) in fp32" in sentence
    assert "2**11" in sentence


def test_a_layer_to_be_kept_in_fp32_as_far_as_anyone_has_looked():
    (sentence,) = sentences(made_up({"a": 22}, {"a": 99}), "serves")
    assert sentence.startswith(
        "No single scale up to 2**20 serves, and larger ones were not looked at: keep a (0.1) in"
    )
    assert "the share flushed at 2**20, which keeps a factor of 16 from overflow" in sentence


def test_everything_overflows():
    result = made_up({"a": -8}, {"a": -8})
    assert advice.window(result) is None
    assert advice.take(result) is None
    assert sentences(result, "Every static loss scale from 2**-8 on")
    assert sentences(result, "fall below 2**-8")


def test_nothing_overflows():
    result = made_up({"a": -8}, {"a": 99})
    assert advice.window(result) == {"low": -8, "high": 20}  # beyond 2**24 nobody has looked
    assert sentences(result, "rise to 2**24 and beyond, where a has most flushed: 1e-06")


def test_bf16_beside_fp16():
    result = sample()
    result["modes"]["manual"]["total"]["error_to_noise"] = 0.001
    result["modes"]["fp16-optimizer-dynamic"]["total"]["error_to_noise"] = 0.002
    result["modes"]["amp-fp16"]["total"]["error_to_noise"] = 0.003
    result["modes"]["amp-bf16"]["total"]["error_to_noise"] = 0.008
    (sentence,) = sentences(result, "bf16's error to noise is above fp16's")
    assert "0.008 in amp-bf16, 8 times the 0.001 of manual" in sentence
    (one, other) = sentences(result, "variance")
    assert "manual's error is 0.001 of the noise" in one
    assert "adds 1e-06" in one
    assert "adds 6.4e-05" in other
    result["modes"]["amp-bf16"]["total"]["error_to_noise"] = 0.0005
    (sentence,) = sentences(result, "not above fp16's")
    assert "0.5 times" in sentence


def test_one_half_dtype_alone_is_compared_with_nothing():
    result = sample()
    del result["modes"]["amp-bf16"]
    assert not sentences(result, "bf16")
    assert len(sentences(result, "variance")) == 1
    result["modes"] = {"fp32": result["modes"]["fp32"]}
    assert not sentences(result, "variance")
    assert not sentences(result, "master weights")


@pytest.mark.parametrize(("bias", "error", "said"), [(0.25, 0.05, True), (0.25, 0.06, False), (0.005, 1e-4, False)])
def test_bias_is_named_where_it_is_one(bias, error, said):
    result = sample()
    result["modes"]["manual"]["total"] |= {"bias": bias, "bias_error": error, "bias_flushed": 0.125}
    found = sentences(result, "is biased")
    assert len(found) == said
    if said:
        assert "manual at a loss scale of 128" in found[0]
        assert "0.25 +- 0.05" in found[0]
        assert "flushed elements alone would make 0.12" in found[0]


def test_overflow_and_stagnation():
    result = sample()
    for mode in result["modes"].values():
        mode["total"]["overflowed"] = 0.0
    assert not sentences(result, "overflows at")
    result["modes"]["amp-fp16"]["total"]["overflowed"] = 0.125
    (sentence,) = sentences(result, "overflows at")
    assert sentence.startswith("amp-fp16 overflows at its loss scale of 65536: 0.12 of")
    (sentence,) = sentences(result, "master weights")
    assert "0.31 in float16 and 0.86 in bfloat16" in sentence


def test_figures_that_do_not_exist_are_passed_over():
    result = sample()
    for mode in result["modes"].values():
        mode["total"] = dict.fromkeys(mode["total"]) | dict.fromkeys(SHARES, 0.0)
    assert len(advice.advise(result)) == 2
