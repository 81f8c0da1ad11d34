"""The sentences that come first: of a comparison, one for each mode; of a probe, what to take."""

import math
from typing import Any

import pytest

from comparisons import make_comparison, make_run
from roundoff.gradients import advice
from roundoff.report import said
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison, Difference, Verdict
from samples import KS, MODES, sample

NAN = math.nan
SEEN = (-0.004, 0.0055)
TESTED = Difference(3, 0.0625, (0.05, 0.075))
AS_WELL = "m trains as well as fp32 in this job: the difference is +0.0012 nats [-0.0040, +0.0055], within 0.01"


def of(
    word: str, *more: Any, tested: Difference | None = None, runs: list[Run] | None = None, **fields: Any
) -> Comparison:
    """A comparison of fp32 with the mode m, which has the verdict `word`."""
    found = make_comparison([make_run("fp32"), *([make_run("m")] if runs is None else runs)])
    mode = vars(found.modes[1]) | {"verdict": Verdict(word, "", *more), "test_difference": tested}
    changed = vars(found) | {"modes": [found.modes[0], type(found.modes[1])(**mode)]} | fields
    return Comparison(**changed)


def broken(seed: int, losses: list[float], applied: list[bool] | None = None, status: str = "diverged") -> Run:
    return make_run("m", seed, losses, applied=applied or [True] * len(losses), status=status)


SKIPS = [True, False, True, False, False]
CASES: dict[str, tuple[Comparison, list[str]]] = {
    "equivalent": (of("equivalent", 5, 0.0012, SEEN, 0.001), [f"{AS_WELL}."]),
    "equivalent by the test, whose interval is the narrower one": (
        of("equivalent", 5, 0.0012, (-0.008, 0.0104), 0.001),
        [
            "m trains as well as fp32 in this job: the difference is +0.0012 nats [-0.0080, +0.0104]; its 90% interval "
            "is within 0.01."
        ],
    ),
    "equivalent at one of five looks": (
        of("equivalent", 5, 0.0012, (-0.008, 0.0104), 0.001, looks=5),
        [
            "m trains as well as fp32 in this job: the difference is +0.0012 nats [-0.0080, +0.0104]; its 98% interval "
            "is within 0.01."
        ],
    ),
    "small margin": (
        of("equivalent", 5, 1e-6, (-1e-5, 2e-5), 0.001, margin=1e-4),
        [
            "m trains as well as fp32 in this job: the difference is +0.000001 nats [-0.000010, +0.000020], "
            "within 0.0001."
        ],
    ),
    "no unit": (
        of("equivalent", 5, 0.0012, SEEN, 0.001, unit=None),
        [AS_WELL.replace(" nats", "") + "."],
    ),
    "worse": (
        of("worse", 5, 0.02, (0.01, 0.03), 0.9),
        ["m trains worse than fp32 in this job: the difference is +0.0200 nats [+0.0100, +0.0300]."],
    ),
    "better, and worse on the test data": (
        of("better", 5, -0.02, (-0.03, -0.01), 0.9, tested=TESTED),
        [
            "m trains better than fp32 in this job: the difference is -0.0200 nats [-0.0300, -0.0100]; on the test "
            "data it is worse, by +0.0625 nats [+0.0500, +0.0750]."
        ],
    ),
    "worse on the test data alone": (
        of("worse", 5, 0.0012, SEEN, 0.001, tested=TESTED),
        [
            "m is worse than fp32 on the test data, by +0.0625 nats [+0.0500, +0.0750]; as to training, the difference "
            "is +0.0012 nats [-0.0040, +0.0055], within 0.01."
        ],
    ),
    "undecided, and equivalent on the test data": (
        of("undecided", 5, 0.002, (-0.02, 0.024), 0.3, 9, tested=Difference(5, 0.004, (-0.0012, 0.0092))),
        [
            "5 seeds cannot tell m from fp32; about 9 would: the difference is +0.0020 nats [-0.0200, +0.0240]; on the "
            "test data the difference is +0.0040 nats [-0.0012, +0.0092], within 0.01."
        ],
    ),
    "undecided, on the test data too": (
        of("undecided", 5, 0.002, (-0.02, 0.024), 0.3, 9, tested=Difference(5, 0.004, (-0.0012, 0.0101))),
        ["5 seeds cannot tell m from fp32; about 9 would: the difference is +0.0020 nats [-0.0200, +0.0240]."],
    ),
    "undecided": (
        of("undecided", 5, 0.002, (-0.02, 0.024), 0.3, 9),
        ["5 seeds cannot tell m from fp32; about 9 would: the difference is +0.0020 nats [-0.0200, +0.0240]."],
    ),
    "undecided for long": (
        of("undecided", 5, 0.002, (-0.02, 0.024), 0.3),
        ["5 seeds cannot tell m from fp32; more than 1000 would: the difference is +0.0020 nats [-0.0200, +0.0240]."],
    ),
    "one seed": (
        of("described", 1, 0.002),
        ["m differs from fp32 by +0.0020 nats; one seed is described, not judged, which takes 3."],
    ),
    "two seeds": (
        of("described", 2, 0.002, (-1, 1.004)),
        ["m differs from fp32 by +0.0020 nats [-1.0000, +1.0040]; 2 seeds are described, not judged, which takes 3."],
    ),
    "incomplete": (
        of("incomplete", 3, 0.0012, SEEN, 0.001),
        [
            "m lacks seeds that fp32 has, so it is not judged; with the other 3 the difference is "
            "+0.0012 nats [-0.0040, +0.0055]."
        ],
    ),
    "not finished": (
        of("not finished", runs=[broken(1, [6.0], status="interrupted")]),
        ["m cannot be compared: no seed of it has finished beside one of fp32."],
    ),
    "diverged": (
        of("diverged", 1, 9.0, runs=[broken(1, [6.0, 5.0, NAN, NAN]), broken(2, [6.0, NAN, 5.0, NAN]), make_run("m")]),
        ["m diverged at steps 3 to 4 in 2 of 3 seeds."],
    ),
    "diverged by steps skipped in a row": (
        of("diverged", runs=[broken(1, [6.0] * 5, SKIPS)]),
        ["m diverged at step 4."],
    ),
    "diverged with finite losses": (
        of("diverged", runs=[broken(1, [6.0, 9.0, 800.0]), make_run("m", 2, [6.0, 5.0, NAN])]),
        ["m diverged at step 3 in 2 of 2 seeds."],
    ),
    "diverged as the reference did": (
        of("equivalent", 3, 0.0012, SEEN, 0.001, runs=[broken(1, [6.0, NAN]), make_run("m", 2)]),
        [f"{AS_WELL}; it diverged at step 2 in 1 of 2 seeds."],
    ),
    "another job": (
        of("equivalent", 5, 0.0012, SEEN, 0.001, accepted=["bptt is 35 in a, 70 in b"]),
        ["These runs do not train the same job.", f"{AS_WELL}."],
    ),
    "another job, as the names say": (
        of("equivalent", 5, 0.0012, SEEN, 0.001, differences=["bptt is 35 in a, 70 in b"]),
        [f"{AS_WELL}."],
    ),
    "the reference alone": (make_comparison([make_run("fp32")]), ["fp32 stands alone: a verdict takes another mode."]),
    "the reference diverged": (
        make_comparison([make_run("fp32", status="diverged")]),
        ["The reference, fp32, diverged at step 4."],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_comparison_says_first_what_was_found(case: str) -> None:
    comparison, sentences = CASES[case]
    assert said.said(comparison) == sentences


def probed(computes: str, error: float | None = 0.01, **total: Any) -> dict[str, Any]:
    """A mode of a probe."""
    figures = {"error_to_noise": error, "bias": 0.001, "bias_error": 0.0001, "overflowed": 0.0}
    return {"computes": computes, "loss_scale": 128.0, "total": figures | total}


def result(modes: dict[str, Any], flushed: float = 0.0, overflows_from: int = 20, **more: Any) -> dict[str, Any]:
    """A probe of one tensor, w, in which all scales flush as much, and those from 2**`overflows_from` on overflow."""
    shares = {"flushed": [flushed] * len(KS), "overflowed": [float(k >= overflows_from) for k in KS]}
    return {"modes": modes, "flush_limit": 1e-3, "scales": {"k": KS, "predicted": {"w": shares}}} | more


FP32, FP16, BF16 = probed("float32"), probed("float16"), probed("bfloat16")
BOTH = {"fp32": FP32, "half": FP16, "brain": BF16}
SERVES: dict[str, Any] = {"window": {"low": 6, "high": 15}, "scale": 11}
NONE: dict[str, Any] = {"window": None, "scale": None}
SCALE = "fp16: 2^11 static, or dynamic."
PROBES: dict[str, tuple[dict[str, Any], str]] = {
    "any": (result(BOTH, **SERVES), f"Any half mode does; bf16 needs no loss scale; {SCALE}"),
    "emulated": (
        result(BOTH | {"e4m3": probed("float8_e4m3fn")}, **SERVES),
        f"Any of the modes in fewer bits does; bf16 needs no loss scale; {SCALE}",
    ),
    "one is bad": (
        result({"half": probed("float16", 0.25), "brain": BF16}, **SERVES),
        f"Take brain; half: an error of 0.25 of the noise between batches; bf16 needs no loss scale; {SCALE}",
    ),
    "one is biased": (
        result({"half": probed("float16", bias=0.07, bias_error=0.001), "brain": BF16}, **SERVES),
        f"Take brain; half: a bias of 0.07 at a loss scale of 128; bf16 needs no loss scale; {SCALE}",
    ),
    "a bias like 0": (
        result({"half": probed("float16", bias=0.07, bias_error=0.05)}, **SERVES),
        f"Take half; {SCALE}",
    ),
    "all are bad": (
        result({"a": probed("float16", None, overflowed=0.5), "b": probed("bfloat16", None)}, **SERVES),
        f"No mode in fewer bits does as it is; a: overflow at a loss scale of 128; b: no known error; {SCALE}",
    ),
    "dynamic flushes": (
        result({"half": FP16}, flushed=0.5, **SERVES),
        "Take half; fp16: 2^11 static.",
    ),
    "dynamic alone": (
        result({}, window=None, scale=3),
        "fp16: a dynamic loss scale; no static one keeps its distance from overflow.",
    ),
    "no scale for w": (
        result({}, flushed=0.5, window=None, scale=3),
        "fp16: no loss scale serves every tensor; 2^3 static, with w in fp32.",
    ),
    "no scale": (result({}, overflows_from=-99, **NONE), "fp16: no loss scale that was looked at serves."),
}


@pytest.mark.parametrize("case", PROBES)
def test_a_probe_says_first_what_to_take(case: str) -> None:
    found, sentence = PROBES[case]
    assert advice.said(found) == sentence


def test_modes_with_one_reason_stand_together() -> None:
    assert set(MODES) >= {"manual", "amp-bf16"}
    assert advice.said(sample()) == (
        "Take manual or amp-bf16; fp16-optimizer-dynamic, amp-fp16: overflow at a loss scale of 65536; "
        "bf16 needs no loss scale; fp16: 2^11 static."
    )
