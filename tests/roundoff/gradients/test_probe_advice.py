"""Each sentence of advice, on results made up for it, with its figure in it."""

import copy
from typing import Any

import pytest

from roundoff.gradients.advice import conclude
from roundoff.gradients.result import SHARES
from samples import KS, sample

Result = dict[str, Any]


def made_up(flushed_below: dict[str, int], overflow_from: dict[str, int], limit: float = 1e-3) -> Result:
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


def sentences(result: Result, word: str) -> list[str]:
    return [sentence for sentence in conclude(result)["advice"] if word in sentence]


SCALES: dict[str, tuple[Result, tuple[int, int] | None, int | None, list[str]]] = {
    "what all tensors allow: at 13 + 4 nothing overflows yet": (
        made_up({"a": 2, "b": 5}, {"a": 30, "b": 18}), (5, 13), 9,
        ["Static loss scales from 2**5 to 2**13 flush less than 0.001 of every gradient with a factor of 16 to "
         "overflow; take 2**9 (512), where a has most flushed: 1e-06.",
         "A dynamic loss scale would settle at 2**17, the largest", "each try of 2**18 costs a step"],
    ),
    "one scale": (
        made_up({"a": 16, "b": 5}, {"a": 30, "b": 21}), (16, 16), 16,
        ["No static loss scale but 2**16 flushes less than 0.001 of every gradient"],
    ),
    "a large limit": (made_up({"a": 5}, {"a": 18}, limit=0.2), (-8, 13), 3, []),
    "the middle of two, below 0 too, is the larger": (made_up({"a": -8}, {"a": 1}), (-8, -4), -6, []),
    "a small limit": (made_up({"a": 5}, {"a": 18}, limit=1e-6), None, 13, []),
    "a layer to be kept in fp32": (
        made_up({"a": 2, "logits": 16, "b": 20}, {"a": 16, "logits": 30, "b": 30}), None, 11,
        ["No single scale serves: keep logits (0.1), b (0.1) in fp32. That is the share flushed at 2**11"],
    ),
    "a layer to be kept in fp32, as far as anyone has looked": (
        made_up({"a": 22}, {"a": 99}), None, 20,
        ["No single scale up to 2**20 serves, and larger ones were not looked at: keep a (0.1) in",
         "the share flushed at 2**20, which keeps a factor of 16 from overflow"],
    ),
    "everything overflows": (
        made_up({"a": -8}, {"a": -8}), None, None, ["Every static loss scale from 2**-8 on", "fall below 2**-8"]
    ),
    "nothing overflows: beyond 2**24 nobody has looked": (
        made_up({"a": -8}, {"a": 99}), (-8, 20), 6, ["rise to 2**24 and beyond, where a has most flushed: 1e-06"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALES)
def test_loss_scales(case: str) -> None:
    result, window, scale, said = SCALES[case]
    found = conclude(result)
    assert found["window"] == (window and dict(zip(("low", "high"), window, strict=True)))
    assert found["scale"] == scale
    for text in said:
        assert sentences(result, text), (text, found["advice"])


def test_bf16_beside_fp16() -> None:
    result = sample()
    for name, figure in {"manual": 1, "fp16-optimizer-dynamic": 2, "amp-fp16": 3, "amp-bf16": 8}.items():
        result["modes"][name]["total"]["error_to_noise"] = figure / 1000
    (sentence,) = sentences(result, "bf16's error to noise is above fp16's")
    assert "0.008 in amp-bf16, 8 times the 0.001 of manual" in sentence
    one, other = sentences(result, "variance")
    assert "manual's error is 0.001 of the noise" in one
    assert "adds 1e-06" in one
    assert "adds 6.4e-05" in other
    result["modes"]["amp-bf16"]["total"]["error_to_noise"] = 0.0005
    (sentence,) = sentences(result, "not above fp16's")
    assert "0.5 times" in sentence


def test_a_dtype_is_what_a_mode_says_and_one_alone_is_compared_with_nothing() -> None:
    result = sample()
    del result["modes"]["amp-bf16"]
    assert not sentences(result, "bf16")
    assert len(sentences(result, "variance")) == 1
    result["modes"] = {"amp-bf16": result["modes"]["fp32"]}  # the name says nothing
    assert not sentences(result, "variance")
    assert not sentences(result, "master weights")


@pytest.mark.parametrize(("bias", "error", "said"), [(0.25, 0.05, True), (0.25, 0.06, False), (0.005, 1e-4, False)])
def test_bias_is_named_where_it_is_one(bias: float, error: float, said: bool) -> None:
    result = sample()
    result["modes"]["manual"]["total"] |= {"bias": bias, "bias_error": error, "bias_flushed": 0.125}
    found = sentences(result, "is biased")
    assert len(found) == said
    for text in ("manual at a loss scale of 128", "0.25 +- 0.05", "flushed elements alone would make 0.12"):
        assert not said or text in found[0]


def test_overflow_and_stagnation() -> None:
    result = sample()
    for mode in result["modes"].values():
        mode["total"]["overflowed"] = 0.0
    assert not sentences(result, "overflows at")
    result["modes"]["amp-fp16"]["total"]["overflowed"] = 0.125
    (sentence,) = sentences(result, "overflows at")
    assert sentence.startswith("amp-fp16 overflows at its loss scale of 65536: 0.12 of")
    (sentence,) = sentences(result, "master weights")
    assert "0.31 in float16 and 0.86 in bfloat16" in sentence


def test_figures_that_do_not_exist_are_passed_over() -> None:
    result = sample()
    for mode in result["modes"].values():
        mode["total"] = dict.fromkeys(mode["total"]) | dict.fromkeys(SHARES, 0.0)
    assert len(conclude(result)["advice"]) == 2
