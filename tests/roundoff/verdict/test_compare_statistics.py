"""The verdict against hand-computed figures, scipy's own tests, and integration of the density."""

import math
from collections.abc import Sequence

import pytest

pytest.importorskip("scipy", reason="this environment lacks scipy, of the extra report")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from fuzzing import fuzz
from roundoff.verdict import statistics
from roundoff.verdict.sequential import Auto
from roundoff.verdict.statistics import Paired, judge
from roundoff.verdict.types import END_LOSS, Verdict

WORDS = ("described", "equivalent", "better", "worse", "undecided", "diverged", "incomplete", "not finished")
MIRRORED = {"better": "worse", "worse": "better"}


def verdict(differences: Sequence[float], margin: float = 0.01) -> Verdict:
    """Of exactly these differences: a reference loss of 0 loses no digit."""
    reference = dict.fromkeys(range(len(differences)), 0.0)
    return judge("manual", dict(enumerate(differences)), reference, margin, "nats")


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


@fuzz(60)
@given(differences, st.floats(1e-4, 0.1))
def test_agrees_with_scipy_and_is_symmetric_in_sign(d: list[float], margin: float) -> None:
    seen, mirrored = verdict(d, margin), verdict([-x for x in d], margin)
    test = stats.ttest_rel(d, [0.0] * len(d))
    low, high = test.confidence_interval(0.95)
    assert seen.difference == pytest.approx(np.mean(d), abs=1e-12)
    assert seen.interval == pytest.approx((low, high), abs=1e-9)
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    assert seen.p_equivalence == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)
    if abs(max(above, below) - 0.05) > 1e-9 and abs(test.pvalue - 0.05) > 1e-9:
        sign = "worse" if np.mean(d) > 0 else "better"
        assert seen.word == ("equivalent" if max(above, below) < 0.05 else sign if test.pvalue < 0.05 else "undecided")
    assert (mirrored.p_equivalence, mirrored.seeds_needed) == (seen.p_equivalence, seen.seeds_needed)
    assert mirrored.interval is not None
    assert seen.interval == pytest.approx((-mirrored.interval[1], -mirrored.interval[0]), abs=1e-15)
    assert mirrored.word == MIRRORED.get(seen.word, seen.word)


OF_THREE = " nats on average of 3 seeds, 95% interval "
CERTAIN = " That it is {}, by less than the margin, is as certain (95%)."
SAID = [
    ([0.001, -0.001, 0.0005], "equivalent", ["manual is equivalent to the reference within 0.01 nats; ", OF_THREE]),
    (
        [0.1, 0.11, 0.12],
        "worse",
        [f"manual is worse than the reference: its {END_LOSS} is higher; ", OF_THREE],
    ),
    (
        [-0.1, -0.11, -0.12],
        "better",
        [f"manual is better than the reference: its {END_LOSS} is lower; ", OF_THREE],
    ),
    (
        [0.02, -0.02, 0.001],
        "undecided",
        [
            "neither to differ from the reference nor to equal it within 0.01 nats; ",
            OF_THREE,
            " If mean and noise stay as seen, it takes about 36 seeds to show equivalence (80% power).",
        ],
    ),
    ([3.0, -3.0, 0.001], "undecided", ["it takes more than 1000 seeds to show"]),
    ([0.001, 0.0011, 0.0012], "equivalent", [CERTAIN.format("worse")]),
    ([-0.001, -0.0011, -0.0012], "equivalent", [CERTAIN.format("better")]),
    ([0.5], "described", ["+0.5 nats with one seed; described, not judged: a verdict takes 3 seeds or more."]),
    (
        [0.001, -0.001, 0.0005, math.nan],
        "diverged",
        ["manual diverged with seed 3, and the reference did not. With the others its training loss of the", OF_THREE],
    ),
    ([0.001, -0.001, math.inf, -math.inf], "diverged", ["manual diverged with seeds 2, 3, and the reference did not."]),
    ([math.nan, math.inf, -math.inf], "diverged", ["manual diverged with seeds 0, 1, 2, and the reference did not."]),
    ([], "not finished", ["no seed has finished with a finite training loss of the second half in both modes."]),
]


@pytest.mark.parametrize(("d", "word", "said"), SAID)
def test_each_verdict_says_its_figures(d: list[float], word: str, said: list[str]) -> None:
    seen = verdict(d)
    assert seen.word == word
    assert all(part in seen.sentence for part in said), seen.sentence
    assert ("certain" in seen.sentence) == any("certain" in part for part in said)
    assert (seen.seeds_needed is not None) == ("it takes about" in seen.sentence)
    counted = sum(map(math.isfinite, d))
    assert (seen.pairs, seen.difference is None, seen.interval is None) == (counted, counted < 1, counted < 2)
    assert (seen.p_equivalence is None) == (counted < 3 or word == "diverged")


def test_seeds_that_went_well_do_not_speak_for_those_that_did_not() -> None:
    """Three of ten seeds that end alike are no equivalence, whatever became of the others."""
    mode, reference = {1: 5.0, 2: 5.001, 3: 4.999}, {s: 5 + 0.0001 * s for s in range(1, 11)}
    seen = judge("m", mode, reference, 0.01, diverged=range(4, 9))
    assert (seen.word, seen.pairs, seen.p_equivalence) == ("diverged", 3, None)
    assert seen.sentence.startswith("m diverged with seeds 4, 5, 6, 7, 8, and the reference did not. With the others")
    seen = judge("m", mode, reference, 0.01)
    assert (seen.word, seen.pairs) == ("incomplete", 3)
    assert seen.sentence.startswith("m lacks seeds of the reference. m is equivalent to the reference within 0.01; ")
    assert (
        "Not counted: seeds 4, 5, 6, 7, 8 and 2 more, which have a training loss of the second half in one of the two"
        in seen.sentence
    )
    better = {seed: loss - 0.1 for seed, loss in mode.items()}
    assert judge("m", better, reference, 0.01).word == "incomplete"
    worse = {seed: loss + 0.1 for seed, loss in mode.items()}
    assert judge("m", worse, reference, 0.01).word == "worse"


def test_where_the_reference_diverged_too_nobody_is_blamed() -> None:
    reference = {1: 5.0, 2: 5.1, 3: 5.2, 4: math.nan}
    seen = judge("m", {1: 5.0, 2: 5.1, 3: 5.2}, reference, 0.01, diverged=[4])
    assert seen.word == "equivalent"
    assert judge("m", {1: 5.0, 2: 5.1, 3: 5.2, 4: math.inf}, reference, 0.01).word == "equivalent"
    assert judge("m", {1: 5.0, 2: 5.1, 3: 5.2, 4: 5.3}, reference, 0.01).word == "equivalent"


@pytest.mark.parametrize("count", [3, 10])
@pytest.mark.parametrize(
    ("value", "word", "p"),
    [(0.0, "equivalent", 0.0), (0.003, "equivalent", 0.0), (0.01, "worse", 1.0), (-0.1, "better", 1.0)],
)
def test_differences_that_do_not_vary(count: int, value: float, word: str, p: float) -> None:
    seen = verdict([value] * count)
    assert (seen.word, seen.difference, seen.interval, seen.p_equivalence) == (word, value, (value, value), p)
    losses = {1: 5.1, 2: 5.3, 3: 5.7}
    same = judge("amp-fp32", losses, losses, 0.01)
    assert (same.word, same.difference, same.interval, same.p_equivalence) == ("equivalent", 0.0, (0.0, 0.0), 0.0)


def test_two_pairs_have_an_interval() -> None:
    """t(0.975, 1) = tan(0.475 pi), and the error of two differences is half their distance."""
    half = 0.1 * math.tan(0.475 * math.pi)
    assert verdict([0.5, 0.7]).interval == pytest.approx((0.6 - half, 0.6 + half))


def test_pairs_are_of_one_seed() -> None:
    seen = judge("manual", {1: 5.0, 2: 6.0, 3: 7.0, 9: 1.0}, {3: 7.1, 2: 6.2, 1: 5.3, 8: 99.0}, 0.01)
    assert (seen.word, seen.pairs) == ("undecided", 3)
    half = 4.30265273 * 0.1 / math.sqrt(3)  # of -0.3, -0.2 and -0.1
    assert seen.interval == pytest.approx((-0.2 - half, -0.2 + half), rel=1e-7)
    assert (
        "Not counted: seeds 8, 9, which have a training loss of the second half in one of the two modes only."
        in seen.sentence
    )
    for bad in (math.nan, math.inf, -math.inf):
        both = judge("manual", {1: bad}, {1: bad}, 0.01)
        assert (both.word, both.pairs, both.difference) == ("not finished", 0, None)


@fuzz(100)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5))
def test_any_losses_give_a_verdict_without_a_warning(losses: list[float]) -> None:
    seen = verdict(losses)
    assert seen.word in WORDS
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
        above, below = (high - half - mean) / error, (low + half - mean) / error
        return float(density * (stats.norm.cdf(above) - stats.norm.cdf(below)))

    return float(integrate.quad(inside, 0, 8 * deviation, limit=200)[0])


@pytest.mark.parametrize(("n", "mean", "deviation"), [(10, 0.0, 0.008), (20, 0.004, 0.009), (200, -0.005, 0.025)])
def test_power_of_equivalence(n: int, mean: float, deviation: float) -> None:
    exact = power_by_integration(n, -0.01, 0.01, mean, deviation, float(stats.t.ppf(0.95, n - 1)))
    assert statistics.power_of_equivalence(Paired(n, mean, deviation), 0.01) == pytest.approx(exact, abs=1e-3)
    assert 0.5 < exact < 0.99


@pytest.mark.parametrize(("n", "mean", "deviation"), [(5, 0.1, 0.06), (34, 0.5, 1.0), (100, -0.02, 0.08)])
def test_power_of_difference(n: int, mean: float, deviation: float) -> None:
    """The textbook case among them: effect 0.5 at 34 pairs has a power of 0.80."""
    exact = power_by_integration(n, 0, 100 * deviation, abs(mean), deviation, float(stats.t.ppf(0.975, n - 1)))
    assert statistics.power_of_difference(Paired(n, mean, deviation)) == pytest.approx(exact, abs=1e-3)


def test_seeds_needed_is_the_least_that_reaches_the_power() -> None:
    paired, inside = Paired(3, 0.5, 1.0), Paired(3, 0.001, 0.02)
    assert statistics.seeds_needed(paired, 0.01) == (34, "a difference")
    assert [statistics.power_of_difference(paired._replace(n=n)) >= 0.8 for n in (33, 34)] == [False, True]
    needed, decision = statistics.seeds_needed(inside, 0.01)
    assert (decision, needed is not None) == ("equivalence", True)
    powers = [statistics.power_of_equivalence(inside._replace(n=n), 0.01) for n in ((needed or 0) - 1, needed or 0)]
    assert powers[0] < 0.8 <= powers[1]
    assert statistics.seeds_needed(Paired(3, 0.0095, 0.005), 0.01) == (5, "a difference")  # the sooner of the two


def test_seeds_needed_can_be_one_more_and_never_as_many_as_there_are() -> None:
    """Where n pairs have just not decided, n pairs decide again in at most 62% of all cases."""
    root = math.sqrt(3)
    assert statistics.seeds_needed(Paired(3, 4.3 / root, 1.0), 0.01) == (4, "a difference")  # of t(0.975, 2) = 4.303
    assert statistics.seeds_needed(Paired(3, 4.0 / root, 1.0), 6.9 / root) == (4, "equivalence")  # t(0.95, 2) = 2.92
    for n in (3, 4, 5, 10, 30, 1000):
        difference, equivalence = (float(stats.t.ppf(p, n - 1)) / math.sqrt(n) for p in (0.975, 0.95))
        assert statistics.power_of_difference(Paired(n, difference, 1.0)) < 0.62
        assert statistics.power_of_equivalence(Paired(n, difference, 1.0), difference + equivalence) < 0.62


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_verdicts_are_as_rare_as_promised(seeds: int) -> None:
    """Experiments without a difference, and with one of exactly the margin: the interval covers 95%, a test errs 5%."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2000, seeds))
    intervals = [statistics.interval(statistics.summarize(list(row))) for row in noise]
    assert 65 <= sum(low > 0 or high < 0 for low, high in intervals) <= 135  # 100 expected, deviation 9.7
    passed = sum(statistics.p_equivalence(statistics.summarize(list(row + 0.03)), 0.03) < 0.05 for row in noise)
    assert 65 <= passed <= 135


@pytest.mark.parametrize("wrong", ["equivalent", "different"])
def test_adding_seeds_until_decided_keeps_the_risk(wrong: str) -> None:
    """By simulation: the true difference is the margin, or 0. With the risk of one look at each, 5% are exceeded."""
    trials, looks = 500, Auto().looks
    drawn = np.random.default_rng(26).normal(1.0 if wrong == "equivalent" else 0.0, 1.0, (trials, looks[-1]))

    def errors(said_looks: int) -> float:
        found = 0
        for sample in drawn:
            for count in looks:
                paired = statistics.summarize(list(sample[:count]), said_looks)
                low, high = statistics.interval(paired)
                equivalent = statistics.p_equivalence(paired, 1.0) < statistics.ALPHA
                if equivalent or not low <= 0 <= high:
                    found += equivalent if wrong == "equivalent" else not low <= 0 <= high
                    break
        return found / trials

    assert errors(len(looks)) <= 0.05 < errors(1)


def test_a_verdict_of_several_looks_gives_each_its_part_of_the_risk() -> None:
    losses = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.25}
    reference = dict.fromkeys(losses, 0.0)
    one, five = (judge("m", losses, reference, 0.5, looks=looks) for looks in (1, 5))
    assert one.p_equivalence is not None
    assert five.p_equivalence == pytest.approx(5 * one.p_equivalence)
    assert five.interval == pytest.approx(
        stats.t.interval(0.99, 3, np.mean([*losses.values()]), stats.sem([*losses.values()]))
    )
    assert statistics.power_of_difference(Paired(8, 1.0, 1.0, 5)) < statistics.power_of_difference(Paired(8, 1.0, 1.0))
    assert statistics.power_of_equivalence(Paired(8, 0.0, 1.0, 5), 1.0) < statistics.power_of_equivalence(
        Paired(8, 0.0, 1.0), 1.0
    )


@pytest.mark.parametrize(
    ("most", "looks"), [(3, [3]), (4, [3, 4]), (20, [3, 5, 8, 12, 20]), (21, [3, 5, 8, 12, 20, 21])]
)
def test_planned_looks(most: int, looks: list[int]) -> None:
    assert Auto(most).looks == looks
