"""Pairs of modes: which must agree to the bit, and what is said where they do and where they do not."""

import math
from pathlib import Path
from typing import Any

import pytest
from test_compare_comparison import OTHER, failure, run

from roundoff.verdict.comparison import compare
from synthetic import LOSSES, SEEDS


def test_nan_equals_nan_in_bit_equality(tmp_path: Path) -> None:
    losses = [6.0, math.nan, math.inf]
    runs = [run(tmp_path, "fp32", 1111, losses), run(tmp_path, "amp-fp32", 1111, losses)]
    (pair,) = compare(runs).pairs
    assert (pair.equal, pair.sentence) == (True, "fp32 and amp-fp32: bit-equal for all 3 steps.")


@pytest.mark.parametrize(
    ("modes", "pairs"),
    [
        (["fp32", "manual", "amp-fp16", "amp-bf16", "fp16-optimizer-dynamic"], []),
        (["fp16-optimizer", "manual"], [("manual", "fp16-optimizer")]),
        (["amp-fp32", "fp16-optimizer-fp32"], [("fp16-optimizer-fp32", "amp-fp32")]),
        (
            ["fp32", "amp-fp32", "fp16-optimizer-fp32"],
            [("fp32", "fp16-optimizer-fp32"), ("fp32", "amp-fp32"), ("fp16-optimizer-fp32", "amp-fp32")],
        ),
    ],
)
def test_pairs_that_must_agree(tmp_path: Path, modes: list[str], pairs: list[tuple[str, str]]) -> None:
    seen = compare([run(tmp_path, mode) for mode in modes]).pairs
    assert [(pair.first, pair.second) for pair in seen] == pairs
    assert all(pair.expected and pair.equal and pair.steps == 8 for pair in seen)


@pytest.mark.parametrize(
    ("modes", "scales", "expected"),
    [
        (("manual", "fp16-optimizer"), (128.0, 128.0), True),
        (("manual", "fp16-optimizer"), (2.0**-3, 2.0**-3), True),
        (("manual", "fp16-optimizer"), (128.0, 256.0), False),
        (("manual", "fp16-optimizer"), (1000.0, 1000.0), False),
        (("manual", "fp16-optimizer"), (128.0, None), False),
        (("manual", "fp16-optimizer"), (math.inf, math.inf), False),
        (("manual", "fp16-optimizer"), (0.0, 0.0), False),
        (("fp32", "amp-fp32"), (1.0, 1024.0), True),
        (("fp32", "amp-fp32"), (1.0, 1000.0), False),
    ],
)
def test_only_powers_of_two_must_agree(tmp_path: Path, modes: Any, scales: Any, expected: bool) -> None:
    runs = [
        run(tmp_path, m, loss_scales=[1.0] * 8, precision={"loss_scale": s}) for m, s in zip(modes, scales, strict=True)
    ]
    assert len(compare(runs).pairs) == expected
    (asked,) = compare(runs, expect_equal=[modes]).pairs
    assert (asked.expected, asked.equal) == (expected, True)


@pytest.mark.parametrize(
    "other",
    [
        {"environment": {"device": "B"}}, {"environment": {"torch": "2.6.0"}}, {"environment": {"threads": 3}},
        {"environment": {"tf32": True}}, {"environment": {"processes": 2}}, {"job": {"lr": 5.0}},
    ],
)  # fmt: skip
def test_other_machines_and_jobs_need_not_agree(tmp_path: Path, other: dict[str, Any]) -> None:
    assert compare([run(tmp_path, "fp32"), run(tmp_path, "amp-fp32", **other)], anyway=True).pairs == []


def test_a_longer_run_must_agree_as_far_as_the_other_goes(tmp_path: Path) -> None:
    runs = [run(tmp_path, "fp32", job={"epochs": 4, "max_steps": 9}), run(tmp_path, "amp-fp32", 1111, LOSSES[:5])]
    (pair,) = compare(runs, anyway=True).pairs
    assert (pair.expected, pair.steps) == (True, 5)


def test_asked_pairs_come_first_and_once(tmp_path: Path) -> None:
    runs = [run(tmp_path, mode) for mode in ("fp32", "amp-fp32", "manual", "fp16-optimizer")]
    asked = [("manual", "fp32"), ("fp16-optimizer", "manual"), ("fp32", "manual")]
    seen = compare(runs, expect_equal=asked).pairs
    assert [(pair.first, pair.second, pair.expected) for pair in seen] == [
        ("fp32", "manual", False),
        ("fp16-optimizer", "manual", True),
        ("fp32", "amp-fp32", True),
    ]


def test_first_step_that_differs_with_both_values(tmp_path: Path) -> None:
    runs = [run(tmp_path, mode, seed) for mode in ("manual", "fp16-optimizer") for seed in SEEDS[:2]]
    runs[3] = run(tmp_path, "fp16-optimizer", SEEDS[1], OTHER)
    (pair,) = compare(runs).pairs
    assert (pair.equal, pair.steps) == (False, 16)
    assert pair.sentence == (
        "manual and fp16-optimizer: differ first at step 5 (seed 1112): "
        "5.5 in manual, 5.500000000000001 in fp16-optimizer. They must agree by design."
    )


def test_first_step_over_all_seeds(tmp_path: Path) -> None:
    early = [*LOSSES[:2], 1.0, *LOSSES[3:]]
    runs = [run(tmp_path, "manual", seed) for seed in SEEDS[:3]]
    runs += [
        run(tmp_path, "fp16-optimizer", seed, losses)
        for seed, losses in zip(SEEDS, (OTHER, early, OTHER), strict=False)
    ]
    (pair,) = compare(runs).pairs
    assert "differ first at step 3 (seed 1112): 6.0 in manual, 1.0 in fp16-optimizer" in pair.sentence


def test_another_length_is_not_equal(tmp_path: Path) -> None:
    runs = [run(tmp_path, "manual"), run(tmp_path, "fp16-optimizer", 1111, LOSSES[:6], status=None)]
    (pair,) = compare(runs).pairs
    assert (pair.equal, pair.steps) == (False, 6)
    assert pair.sentence == (
        "manual and fp16-optimizer: bit-equal in the 6 steps that both have, but with seed 1111 manual has 8 steps and "
        "fp16-optimizer 6."
    )


def test_a_seed_that_failed_is_not_equal(tmp_path: Path) -> None:
    runs = [run(tmp_path, "manual"), run(tmp_path, "manual", 1112), run(tmp_path, "fp16-optimizer")]
    (pair,) = compare(runs, [failure("fp16-optimizer", 1112)]).pairs
    assert (pair.equal, pair.steps) == (False, 8)
    assert "but seed 1112 has a run of manual only" in pair.sentence
    (none,) = compare(runs[:1], [failure("fp16-optimizer")], expect_equal=[("manual", "fp16-optimizer")]).pairs
    assert (none.equal, none.steps) == (False, 0)
    assert "not compared: no seed has a run of both" in none.sentence
