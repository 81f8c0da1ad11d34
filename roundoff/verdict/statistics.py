"""Judges a mode by its losses at the end, paired by seed: one seed gives every mode the same start, batches and masks.

With n differences d_i (mode minus reference) of mean m and standard deviation s, m / (s / sqrt(n)) follows Student's
t with n - 1 degrees of freedom where the true difference is 0 and the d_i are normal. Equivalence is shown by two
one-sided t-tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987): both "at most -margin" and "at least +margin"
must be rejected at 5%, which is the same as a 90% interval within the margin.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

from roundoff.extras import needs
from roundoff.verdict.types import END_LOSS, TEST_LOSS, Verdict

ALPHA = 0.05
TEST_LOSS_ALPHA = 0.01
"""Smaller, since it comes on top of the verdict's own risk, and all modes share the test losses of the reference."""
POWER = 0.8
MAX_SEEDS = 1000
ENOUGH_PAIRS = 3
"""The fewest pairs for a verdict. The interval of two pairs has one degree of freedom, and says next to nothing."""


class Paired(NamedTuple):
    """Number, mean and sample standard deviation (n - 1) of paired differences; deviation 0 where there is one.

    `looks` is how often the verdict may be looked at while pairs are added; each look has as small a part of the risk.
    """

    n: int
    mean: float
    deviation: float
    looks: int = 1

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.n)


def judge(
    label: str,
    mode_losses: dict[int, float],
    reference_losses: dict[int, float],
    margin: float,
    unit: str = "",
    figure: str = END_LOSS,
    diverged: Collection[int] = (),
    looks: int = 1,
) -> Verdict:
    """Compare a mode's losses with the reference's, seed by seed.

    A mode that diverged with a seed with which the reference ended well is "diverged": what its other seeds show is
    described, and not judged, since they are those that went well. So is one whose loss is not finite there.

    From three pairs on: "equivalent" where both one-sided tests against `margin` reject at 5%; else "better" or
    "worse" where the 95% interval excludes 0 (a lower loss is better); else "undecided". A difference that is both
    certain and smaller than the margin is "equivalent", and the sentence says that it is certain. Where the mode lacks
    a seed that the reference has, "equivalent" and "better" become "incomplete".

    Args:
        label: the mode's.
        mode_losses, reference_losses: seed -> loss at the end of the runs that have finished. A pair whose difference
            is not finite does not count, and the sentence says so.
        margin: above 0, in the losses' unit.
        unit: of a difference, such as "nats"; "" for none.
        figure: what the losses are.
        diverged: seeds with which the mode diverged.
        looks: how often the verdict may be looked at while seeds are added. The risk of 5%, and the interval's, are
            those of all looks together; the p-value is multiplied by their number (Bonferroni).
    """
    seeds = sorted(mode_losses.keys() & reference_losses.keys())
    differences = {seed: mode_losses[seed] - reference_losses[seed] for seed in seeds}
    counted = [d for d in differences.values() if math.isfinite(d)]
    left_out = [seed for seed, d in differences.items() if not math.isfinite(d)]
    alone = sorted(mode_losses.keys() ^ reference_losses.keys())
    remark = _remark(left_out, f"has a {figure} that is not finite", f"have a {figure} that is not finite")
    in_one = f"a {figure} in one of the two modes only"
    remark += _remark([seed for seed in alone if seed not in diverged], f"has {in_one}", f"have {in_one}")
    said_unit = f" {unit}" if unit else ""
    bad = {seed for seed in diverged if math.isfinite(reference_losses.get(seed, 0.0))}
    bad |= {seed for seed in seeds if not math.isfinite(mode_losses[seed]) and math.isfinite(reference_losses[seed])}
    if bad:
        return _diverged(label, sorted(bad), counted, said_unit, figure, looks)
    if not counted:
        return Verdict("not finished", f"{label}: no seed has finished with a finite {figure} in both modes.{remark}")
    paired = summarize(counted, looks)
    if paired.n >= ENOUGH_PAIRS:
        found = _decide(label, paired, margin, remark, said_unit, figure)
        missing = reference_losses.keys() - mode_losses.keys() - set(diverged)
        if missing and found.word in ("equivalent", "better"):
            more = " Nothing is said of the mode, since seeds are missing that may have gone worse."
            return replace(
                found, word="incomplete", sentence=f"{label} lacks seeds of the reference. {found.sentence}{more}"
            )
        return found
    bounds = interval(paired) if paired.n > 1 else None
    sentence = (
        f"{label}: {figure} minus the reference's is {_seen(paired, bounds, said_unit)}; described, not judged: "
        f"a verdict takes {ENOUGH_PAIRS} seeds or more.{remark}"
    )
    return Verdict("described", sentence, paired.n, paired.mean, bounds)


def paired_by_seed(mode_losses: dict[int, float], reference_losses: dict[int, float], looks: int = 1) -> Paired | None:
    """Return the paired differences of two modes' losses by seed; None where no difference is finite."""
    pairs = ((loss, reference_losses.get(seed, math.nan)) for seed, loss in sorted(mode_losses.items()))
    counted = [loss - other for loss, other in pairs if math.isfinite(loss - other)]
    return summarize(counted, looks) if counted else None


def heed_test_loss(label: str, verdict: Verdict, tested: Paired, margin: float, unit: str = "") -> Verdict:
    """Return `verdict` as it is, unless the test loss of three pairs or more surely differs by more than `margin`.

    Surely means that its 99% interval lies beyond the margin. A mode that trains equivalently is "worse" or "better"
    then. Any other word stays, and the sentence says what the test loss shows.
    """
    if tested.n < ENOUGH_PAIRS or verdict.word == "diverged":
        return verdict
    low, high = interval(tested, TEST_LOSS_ALPHA)
    sign = "worse" if low > margin else "better" if high < -margin else None
    if sign in (None, verdict.word):
        return verdict
    minus = f"{TEST_LOSS} minus the reference's is {_seen(tested, interval(tested), f' {unit}' if unit else '')}"
    if verdict.word == "equivalent":
        said = f"{label} is {sign} than the reference on the test data; {minus}. As to training, {verdict.sentence}"
        return replace(verdict, word=sign, sentence=said)
    return replace(verdict, sentence=f"{verdict.sentence} On the test data it is {sign}: {minus}.")


def _diverged(label: str, seeds: list[int], counted: list[float], unit: str, figure: str, looks: int) -> Verdict:
    several = len(seeds) > 1
    names = ", ".join(map(str, seeds[:5])) + (f" and {len(seeds) - 5} more" if len(seeds) > 5 else "")
    sentence = f"{label} diverged with seed{'s' if several else ''} {names}, and the reference did not."
    if not counted:
        return Verdict("diverged", sentence)
    paired = summarize(counted, looks)
    bounds = interval(paired) if paired.n > 1 else None
    seen = f"With the others its {figure} minus the reference's is {_seen(paired, bounds, unit)}."
    return Verdict("diverged", f"{sentence} {seen}", paired.n, paired.mean, bounds)


def _decide(label: str, paired: Paired, margin: float, remark: str, unit: str, figure: str) -> Verdict:
    low, high = interval(paired)
    p = p_equivalence(paired, margin)
    sign = "worse" if low > 0 else "better" if high < 0 else None
    needed = None
    if p < ALPHA:
        word, said, more = "equivalent", f"is equivalent to the reference within {margin:g}{unit}", ""
        if sign:
            more = f" That it is {sign}, by less than the margin, is as certain (95%)."
    elif sign:
        word, more = sign, ""
        said = f"is {word} than the reference: its {figure} is {'higher' if low > 0 else 'lower'}"
    else:
        word, said = (
            "undecided",
            f"is shown neither to differ from the reference nor to equal it within {margin:g}{unit}",
        )
        needed, decision = seeds_needed(paired, margin)
        count = f"about {needed}" if needed else f"more than {MAX_SEEDS}"
        more = f" If mean and noise stay as seen, it takes {count} seeds to show {decision} (80% power)."
    seen = f"{figure} minus the reference's is {_seen(paired, (low, high), unit)}, p = {p:.2g} for equivalence"
    return Verdict(word, f"{label} {said}; {seen}.{more}{remark}", paired.n, paired.mean, (low, high), p, needed)


def summarize(differences: list[float], looks: int = 1) -> Paired:
    """Return number, mean and standard deviation of finite `differences`."""
    n = len(differences)
    if min(differences) == max(differences):  # exactly, where rounding would leave a deviation of 1e-17
        return Paired(n, differences[0], 0.0, looks)
    mean = math.fsum(d / n for d in differences)
    return Paired(n, mean, math.hypot(*(d - mean for d in differences)) / math.sqrt(n - 1), looks)


def interval(paired: Paired, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the two-sided interval of the mean (Student's t) of two differences or more, by default that of 95%.

    With several looks, those of all together cover so often.
    """
    half = float(_scipy().t.ppf(1 - alpha / paired.looks / 2, paired.n - 1)) * paired.error
    return paired.mean - half, paired.mean + half


def p_equivalence(paired: Paired, margin: float) -> float:
    """Return the larger p-value of the two one-sided t-tests; 0 or 1 if the differences do not vary.

    It is multiplied by the number of looks, up to 1.
    """
    if paired.error == 0:
        return 0.0 if abs(paired.mean) < margin else 1.0
    # Both tests mirror each other, so that the one for the nearer margin has the larger p-value.
    p = float(_scipy().t.sf((margin - abs(paired.mean)) / paired.error, paired.n - 1))
    return min(1.0, p * paired.looks)


def seeds_needed(paired: Paired, margin: float) -> tuple[int | None, str]:
    """Return how many seeds decide with 80% power if mean and deviation stay as seen, and what they show.

    The t-test can show a difference. If the mean is within the margin, the one-sided tests can show equivalence.
    The decision that takes fewer seeds is returned; None if both take more than `MAX_SEEDS`.
    """
    found = [(_least(lambda n: power_of_difference(paired._replace(n=n)), paired.n + 1), "a difference")]
    if abs(paired.mean) < margin:
        equivalence = _least(lambda n: power_of_equivalence(paired._replace(n=n), margin), paired.n + 1)
        found.insert(0, (equivalence, "equivalence"))
    return min(found, key=lambda decision: decision[0] or math.inf)


def power_of_difference(paired: Paired) -> float:
    """Return the power of the two-sided paired t-test, by the noncentral t distribution.

    Cohen, Statistical Power Analysis for the Behavioral Sciences (1988).
    """
    critical = float(_scipy().t.ppf(1 - ALPHA / paired.looks / 2, paired.n - 1))
    return _beyond(critical, paired, abs(paired.mean)) + _beyond(critical, paired, -abs(paired.mean))


def power_of_equivalence(paired: Paired, margin: float) -> float:
    """Return the power of the two one-sided tests, by the noncentral t distribution.

    The approximation of Diletti et al., Int. J. Clin. Pharmacol. 29 (1991), and Phillips, J. Pharmacokinet.
    Biopharm. 18 (1990): that both reject is as likely as the one plus the other minus 1.
    """
    critical = float(_scipy().t.ppf(1 - ALPHA / paired.looks, paired.n - 1))
    near, far = margin - abs(paired.mean), margin + abs(paired.mean)
    return max(0.0, _beyond(critical, paired, near) + _beyond(critical, paired, far) - 1)


def _beyond(critical: float, paired: Paired, distance: float) -> float:
    # Beyond 40 standard errors the answer is 0 or 1 to all digits, and the noncentral t is hard to compute.
    noncentrality = min(40.0, max(-40.0, distance / paired.error))
    return float(_scipy().nct.sf(critical, paired.n - 1, noncentrality))


def _least(power: Callable[[int], float], low: int) -> int | None:
    """Return the least n from `low` to `MAX_SEEDS` at which `power`, which grows with n, reaches `POWER`."""
    high = MAX_SEEDS
    if low > high or power(high) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        if power(middle) < POWER:
            low = middle + 1
        else:
            high = middle
    return low


def _scipy() -> Any:
    """Return scipy.stats, which takes a second to import and comes with an extra."""
    with needs("report"):
        from scipy import stats
    return stats


def _seen(paired: Paired, bounds: tuple[float, float] | None, unit: str) -> str:
    if bounds is None:
        return f"{paired.mean:+.4g}{unit} with one seed"
    of = f"{paired.mean:+.4g}{unit} on average of {paired.n} seeds"
    return f"{of}, 95% interval {bounds[0]:+.4g} to {bounds[1]:+.4g}"


def _remark(seeds: list[int], one: str, several: str) -> str:
    if not seeds:
        return ""
    names = ", ".join(map(str, seeds[:5])) + (f" and {len(seeds) - 5} more" if len(seeds) > 5 else "")
    return f" Not counted: seed{'s' if len(seeds) > 1 else ''} {names}, which {several if len(seeds) > 1 else one}."
