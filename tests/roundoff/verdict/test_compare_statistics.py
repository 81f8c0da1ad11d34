"""The verdict against hand-computed figures, scipy's own tests, and integration of the density."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from roundoff.verdict import statistics
from roundoff.verdict.statistics import Paired, judge
from roundoff.verdict.types import Verdict


def verdict(differences: Sequence[float], margin: float = 0.01) -> Verdict:
    """Of exactly these differences: a reference loss of 0 loses no digit."""
    reference = dict.fromkeys(range(len(differences)), 0.0)
    return judge("manual", dict(enumerate(differences)), reference, margin)


def test_hand_computed() -> None:
    """Mean 2, deviation 1, error 1/sqrt(3); t(0.975, 2) = 4.30265273; for 2 degrees of freedom the tail is closed:
    P(T > t) = 1/2 - t / (2 sqrt(2 + t^2))."""
    seen = verdict([1.0, 2.0, 3.0], margin=7.0)
    assert seen.difference == pytest.approx(2, rel=1e-15)
    assert seen.interval == pytest.approx((2 - 4.30265273 / math.sqrt(3), 2 + 4.30265273 / math.sqrt(3)), rel=1e-7)
    t = (7 - 2) * math.sqrt(3)
    assert seen.p_equivalence == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-9)
    assert (seen.word, seen.pairs) == ("equivalent", 3)


differences = st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=12).filter(lambda d: np.std(d) > 1e-6)


@settings(max_examples=60, deadline=None)
@given(differences, st.floats(1e-4, 0.1))
def test_agrees_with_scipy(d: list[float], margin: float) -> None:
    seen = verdict(d, margin)
    test = stats.ttest_rel(d, [0.0] * len(d))
    low, high = test.confidence_interval(0.95)
    assert seen.difference == pytest.approx(np.mean(d), abs=1e-12)
    assert seen.interval == pytest.approx((low, high), abs=1e-9)
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    assert seen.p_equivalence == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)
    if seen.word in ("better", "worse"):
        assert test.pvalue < 0.05
    if seen.word == "undecided":
        assert test.pvalue > 0.05 - 1e-9
        assert max(above, below) > 0.05 - 1e-9


@settings(max_examples=40, deadline=None)
@given(differences)
def test_symmetric_in_sign(d: list[float]) -> None:
    seen, mirrored = verdict(d), verdict([-x for x in d])
    assert mirrored.p_equivalence == seen.p_equivalence
    assert mirrored.seeds_needed == seen.seeds_needed
    assert mirrored.interval is not None
    assert seen.interval == pytest.approx((-mirrored.interval[1], -mirrored.interval[0]), abs=1e-15)
    assert mirrored.word == {"better": "worse", "worse": "better"}.get(seen.word, seen.word)


@pytest.mark.parametrize(
    ("d", "word", "said"),
    [
        ([0.001, -0.001, 0.0005], "equivalent", "manual is equivalent to the reference within 0.01 nats; "),
        ([0.1, 0.11, 0.12], "worse", "manual is worse than the reference: its test loss is higher; "),
        ([-0.1, -0.11, -0.12], "better", "manual is better than the reference: its test loss is lower; "),
        ([0.02, -0.02, 0.001], "undecided", "neither to differ from the reference nor to equal it within 0.01 nats"),
    ],
)
def test_each_verdict(d: list[float], word: str, said: str) -> None:
    seen = verdict(d)
    assert seen.word == word
    assert said in seen.sentence
    assert f"{seen.difference:+.4g} nats on average of 3 seeds, 95% interval " in seen.sentence
    assert "certain" not in seen.sentence
    assert (seen.seeds_needed is not None) == (word == "undecided")


def test_tiny_but_certain_difference_is_equivalent() -> None:
    assert " That it is worse, by less than the margin, is as certain" in verdict([0.001, 0.0011, 0.0012]).sentence
    seen = verdict([-0.001, -0.0011, -0.0012])
    assert seen.word == "equivalent"
    assert " That it is better, by less than the margin, is as certain" in seen.sentence


@pytest.mark.parametrize("count", [3, 10])
@pytest.mark.parametrize(
    ("value", "word", "p"),
    [(0.0, "equivalent", 0.0), (0.003, "equivalent", 0.0), (0.01, "worse", 1.0), (-0.1, "better", 1.0)],
)
def test_differences_that_do_not_vary(count: int, value: float, word: str, p: float) -> None:
    seen = verdict([value] * count)
    assert (seen.word, seen.difference, seen.interval, seen.p_equivalence) == (word, value, (value, value), p)


def test_equal_losses_that_are_no_round_numbers() -> None:
    losses = {1: 5.1, 2: 5.3, 3: 5.7}
    seen = judge("amp-fp32", losses, losses, 0.01)
    assert (seen.word, seen.difference, seen.interval, seen.p_equivalence) == ("equivalent", 0.0, (0.0, 0.0), 0.0)


def test_fewer_than_three_pairs_are_described() -> None:
    one, two = verdict([0.5]), verdict([0.5, 0.7])
    assert (one.word, one.pairs, one.difference, one.interval) == ("described", 1, 0.5, None)
    assert "+0.5 nats with one seed; described, not judged: a verdict takes 3 seeds or more." in one.sentence
    assert (two.word, two.pairs, two.p_equivalence) == ("described", 2, None)
    # t(0.975, 1) = tan(0.475 pi) = 12.7062, and the error of two differences is half their distance.
    assert two.interval == pytest.approx((0.6 - 0.1 * math.tan(0.475 * math.pi), 0.6 + 0.1 * math.tan(0.475 * math.pi)))


def test_pairs_are_of_one_seed() -> None:
    seen = judge("manual", {1: 5.0, 2: 6.0, 3: 7.0, 9: 1.0}, {3: 7.1, 2: 6.2, 1: 5.3, 8: 99.0}, 0.01)
    assert (seen.word, seen.pairs) == ("undecided", 3)
    assert seen.difference == pytest.approx(-0.2, abs=1e-12)
    assert "Not counted: seeds 8, 9, which have finished in one of the two modes only." in seen.sentence


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_do_not_count(bad: float) -> None:
    assert verdict([bad, bad, bad]).word == "not finished"
    seen = verdict([0.001, -0.001, 0.0005, bad])
    assert (seen.word, seen.pairs) == ("equivalent", 3)
    assert "Not counted: seed 3, which has a test loss that is not finite." in seen.sentence
    both = judge("manual", {1: bad}, {1: bad}, 0.01)
    assert (both.word, both.pairs, both.difference) == ("not finished", 0, None)


def test_nothing_finished() -> None:
    seen = judge("manual", {}, {1: 5.0}, 0.01)
    assert (seen.word, seen.pairs, seen.difference, seen.interval) == ("not finished", 0, None, None)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_losses_give_a_verdict_without_a_warning(losses: list[float]) -> None:
    seen = verdict(losses)
    assert seen.word in ("described", "equivalent", "better", "worse", "undecided", "not finished")
    assert seen.sentence.isprintable()


def power_by_integration(n: int, low: float, high: float, mean: float, deviation: float, critical: float) -> float:
    """P(low + critical s / sqrt(n) < m < high - critical s / sqrt(n)), integrated over s, which is independent of m:
    s^2 (n - 1) / deviation^2 follows chi-square. No noncentral t is involved."""
    error = deviation / math.sqrt(n)

    def inside(s: float) -> float:
        half = critical * s / math.sqrt(n)
        if low + half >= high - half:
            return 0.0
        density = stats.chi2.pdf(s * s * (n - 1) / deviation**2, n - 1) * 2 * s * (n - 1) / deviation**2
        return float(
            density * (stats.norm.cdf((high - half - mean) / error) - stats.norm.cdf((low + half - mean) / error))
        )

    value, _ = integrate.quad(inside, 0, 8 * deviation, limit=200)
    return float(value)


@pytest.mark.parametrize(("n", "mean", "deviation"), [(10, 0.0, 0.008), (20, 0.004, 0.009), (200, -0.005, 0.025)])
def test_power_of_equivalence(n: int, mean: float, deviation: float) -> None:
    exact = power_by_integration(n, -0.01, 0.01, mean, deviation, float(stats.t.ppf(0.95, n - 1)))
    assert statistics.power_of_equivalence(Paired(n, mean, deviation), 0.01) == pytest.approx(exact, abs=1e-3)
    assert 0.5 < exact < 0.99


@pytest.mark.parametrize(("n", "mean", "deviation"), [(5, 0.1, 0.06), (34, 0.5, 1.0), (100, -0.02, 0.08)])
def test_power_of_difference(n: int, mean: float, deviation: float) -> None:
    """The textbook case among them: effect 0.5 at 34 pairs has a power of 0.80."""
    critical = float(stats.t.ppf(0.975, n - 1))
    above = power_by_integration(n, 0, 100 * deviation, abs(mean), deviation, critical)
    assert statistics.power_of_difference(Paired(n, mean, deviation)) == pytest.approx(above, abs=1e-3)


def test_seeds_needed_is_the_least_that_reaches_the_power() -> None:
    paired = Paired(3, 0.5, 1.0)
    assert statistics.seeds_needed(paired, 0.01) == (34, "a difference")
    assert (
        statistics.power_of_difference(paired._replace(n=33))
        < 0.8
        <= statistics.power_of_difference(paired._replace(n=34))
    )
    inside = Paired(3, 0.001, 0.02)
    needed, decision = statistics.seeds_needed(inside, 0.01)
    assert decision == "equivalence"
    assert needed is not None
    assert statistics.power_of_equivalence(inside._replace(n=needed - 1), 0.01) < 0.8
    assert statistics.power_of_equivalence(inside._replace(n=needed), 0.01) >= 0.8


def test_difference_close_to_the_margin_is_decided_by_the_sooner_test() -> None:
    needed, decision = statistics.seeds_needed(Paired(3, 0.0095, 0.005), 0.01)
    assert (needed, decision) == (5, "a difference")


def test_seeds_needed_is_bounded() -> None:
    seen = verdict([3.0, -3.0, 0.001])
    assert (seen.word, seen.seeds_needed) == ("undecided", None)
    assert "it takes more than 1000 seeds to show" in seen.sentence


def test_undecided_says_how_many_seeds() -> None:
    seen = verdict([0.02, -0.02, 0.001])
    assert seen.word == "undecided"
    assert f"it takes about {seen.seeds_needed} seeds to show equivalence (80% power)" in seen.sentence
    assert seen.seeds_needed is not None
    assert seen.seeds_needed > 3


def test_false_verdicts_are_as_rare_as_promised() -> None:
    """2000 experiments without a difference, and 2000 with one of exactly the margin."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2000, 5))
    wrong = sum(verdict(list(row), 1e-9).word in ("better", "worse") for row in noise[:500])
    assert 10 <= wrong <= 40  # 25 expected, deviation 4.9
    passed = sum(statistics.p_equivalence(statistics.summarize(list(row + 0.03)), 0.03) < 0.05 for row in noise)
    assert 65 <= passed <= 135  # 100 expected, deviation 9.7
