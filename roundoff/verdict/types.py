"""The values that a comparison consists of. Losses are in the unit that the runs say, such as "nats a word"."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roundoff.errors import printable
from roundoff.runs.reading import Run, has_perplexity

LONGEST_UNIT = 20
"""Letters; units come from run directories."""
END_LOSS = "training loss of the second half"
"""What the verdicts compare: the mean training loss of the second half of a run's steps."""
TEST_LOSS = "test loss"


@dataclass(frozen=True)
class Failure:
    """A run that left nothing to compare: its command, its exit code, and the last line that it printed."""

    label: str
    seed: int
    command: list[str]
    exit_code: int
    message: str


@dataclass(frozen=True)
class Verdict:
    """The judgement of a mode by its training losses, paired with those of the reference.

    Attributes:
        word: "reference", "described" (fewer than three pairs), "equivalent", "better", "worse", "undecided",
            "diverged" (with a seed with which the reference ended well), "incomplete" (seeds are missing), or "not
            finished" (no pair at all).
        sentence: the same with its figures, for a person.
        pairs: seeds that both have finished.
        difference: mean of mode minus reference; None without a pair.
        interval: its 95% interval (Student's t); None with fewer than two pairs.
        p_equivalence: p-value of the two one-sided tests against the margin; None with fewer than three pairs.
        seeds_needed: for "undecided", how many seeds would decide at the noise seen, up to 1000; else None.
    """

    word: str
    sentence: str
    pairs: int = 0
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_equivalence: float | None = None
    seeds_needed: int | None = None


@dataclass(frozen=True)
class Difference:
    """A difference that is shown beside the verdict, and decides nothing.

    Attributes:
        pairs: seeds with which both modes have the figure, and the difference is finite; at least one.
        difference: mean of mode minus reference.
        interval: its 95% interval (Student's t); None with one pair.
    """

    pairs: int
    difference: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class ModeSummary:
    """A row of the table; means over the mode's seeds where there are several.

    Attributes:
        label, runs, failures: the mode and what it left, runs sorted by seed.
        status: that of its runs, "finished" or for example "finished, diverged".
        test_loss, test_ppl: None where no run has them, or one has diverged, which the mean of the others would hide;
            test_ppl is exp(test_loss) where losses are in nats a word.
        verdict: against the reference.
        first_difference: first step whose loss differs in a bit from the reference's with the same seed, the least
            over seeds; None: no difference in the steps that both have (or it is the reference).
        steps, updates, skipped: batches seen, of these applied, of these skipped, summed over the runs.
        final_loss_scale: of the last step of the first seed.
        tokens_per_second, peak_memory_bytes: mean and maximum; None where no run has them.
        end_loss: mean training loss of the second half of the steps, of the seeds that have finished; None where there
            is none, or one has diverged.
        test_difference: of the test losses; None without a pair.
    """

    label: str
    runs: list[Run]
    failures: list[Failure]
    status: str
    test_loss: float | None
    test_ppl: float | None
    verdict: Verdict
    first_difference: int | None
    steps: int
    updates: int
    skipped: int
    final_loss_scale: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    end_loss: float | None = None
    test_difference: Difference | None = None


@dataclass(frozen=True)
class BitEquality:
    """The agreement of two modes in every bit of every training loss, seed by seed.

    Attributes:
        first, second: labels.
        expected: they must agree by design: each run names the other mode.
        steps: how many were compared, over all seeds.
        equal: no step differs, and both have as many.
        sentence: "bit-equal for all N steps", or the first step that differs and both values.
    """

    first: str
    second: str
    expected: bool
    steps: int
    equal: bool
    sentence: str


@dataclass(frozen=True)
class Equivalence:
    """The verdict on the mode `second` with `first` as its reference."""

    first: str
    second: str
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """Return the verdict's sentence, and which mode is the reference in it."""
        return f"with {self.first} as the reference, {self.verdict.sentence}"


@dataclass(frozen=True)
class Probe:
    """The result of a probe, or why there is none.

    Attributes:
        title: says which weights were probed.
        path: the directory of its files.
        result: as `roundoff.gradients.result.read_probe` returns it; None where the probe failed.
        problem: the last line that it said where it failed.
    """

    title: str
    path: Path
    result: dict[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All that `summary.json`, the table and the report show.

    Attributes:
        reference: label of the mode that the others are compared with.
        margin: of equivalence, in the unit of the losses.
        modes: in the order they were asked for; the reference first.
        pairs: bit-equality of the pairs that must agree or were named with --expect-equal.
        covers: sentences on what the intervals cover and what not.
        differences: what the runs do not have in common, a line each: between groups that have names, else only with
            --anyway.
        probes: of the reference's initial and final weights, where they were asked for.
        unit: of the losses, such as "nats a word"; None where the runs say none.
        end: what the verdicts compare: "training loss of the second half" of a run's steps.
        equivalences: of the pairs named with --expect-equivalent.
        looks: how often the verdicts may be looked at while seeds are added.
        accepted: those of `differences` that no name says to be meant, and that are there by --anyway.
    """

    reference: str
    margin: float
    modes: list[ModeSummary]
    pairs: list[BitEquality]
    covers: list[str]
    differences: list[str]
    probes: list[Probe] = field(default_factory=list)
    unit: str | None = None
    end: str = END_LOSS
    equivalences: list[Equivalence] = field(default_factory=list)
    looks: int = 1
    accepted: list[str] = field(default_factory=list)

    @property
    def short_unit(self) -> str:
        """Return the unit of a difference, such as "nats"; "" without a unit."""
        return short_unit(self.unit)

    @property
    def has_test_loss(self) -> bool:
        """Return whether a mode has a test loss, or a difference of test losses."""
        return any(mode.test_loss is not None or mode.test_difference is not None for mode in self.modes)

    @property
    def has_perplexity(self) -> bool:
        """Return whether exp of a loss is a perplexity."""
        return has_perplexity(self.unit)


def short_unit(unit: str | None) -> str:
    """Return `unit` without what it is counted by: "nats" of "nats a word"; "" of None. It is one short line."""
    return printable((unit or "").partition(" a ")[0], LONGEST_UNIT)
