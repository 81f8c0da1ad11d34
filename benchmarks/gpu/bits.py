"""The part "bits": whether runs that must be equal are so in every bit of every step."""

from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.trainers import Run, Trainers
from lm.options.modes import MODES
from lm.options.options import words

FIELDS = ("loss", "grad_norm", "applied")
TWICE = ("fp32", "manual", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")
EQUAL = (("fp32", "amp-fp32"), ("manual", "fp16-optimizer"))
STEPS, FEW_STEPS = 200, 10


def run(report: Report, settings: Settings) -> None:
    """Compare pairs of runs, with and without --deterministic."""
    trainers = Trainers(settings)
    for deterministic in (True, False):
        twice = TWICE if not settings.small else ("fp32",)
        alike = EQUAL if deterministic or not settings.small else ()
        names = dict.fromkeys((*twice, *(mode for pair in alike for mode in pair)))
        jobs = [(mode, copy) for mode in names for copy in range(1 + (mode in twice))]

        def train(job: tuple[str, int], deterministic: bool = deterministic) -> Run:
            return _train(trainers, *job, deterministic, FEW_STEPS if settings.small else STEPS)

        runs = dict(zip(jobs, trainers.at_once(train, jobs), strict=True))
        for mode in twice:
            compare(report, f"{mode} twice", runs[mode, 0], runs[mode, 1], deterministic)
        for one, other in alike:
            compare(report, f"{one} and {other}", runs[one, 0], runs[other, 0], deterministic)


def _train(trainers: Trainers, mode: str, copy: int, deterministic: bool, steps: int) -> Run:
    options = words({**MODES[mode].options, "deterministic": deterministic, "max_steps": steps})
    return trainers.train(f"{mode}-{copy}-{deterministic}", f"{MODES[mode].script}.py", *options)


def compare(report: Report, pair: str, one: Run | Exception, other: Run | Exception, deterministic: bool) -> None:
    """Report whether two runs are equal; they must be with --deterministic."""
    how = "with" if deterministic else "without"
    with report.guarded(f"{pair}, {how} --deterministic"):
        for run in (one, other):
            if isinstance(run, Exception):
                raise run
        assert isinstance(one, Run)
        assert isinstance(other, Run)
        report.check(
            f"{', '.join(FIELDS)} of {pair}, {how} --deterministic",
            first_difference(one, other, FIELDS),
            "equal",
            required=deterministic,
            means=("", "" if deterministic else "some kernel is not the same from run to run"),
        )


def first_difference(one: Run, other: Run, fields: tuple[str, ...]) -> str:
    """Return "equal", or where the steps of two runs part."""
    first, second = one.rows("steps.jsonl"), other.rows("steps.jsonl")
    for a, b in zip(first, second, strict=False):
        for name in fields:
            if a[name] != b[name]:
                return f"from step {a['step']} on another {name}, {a[name]!r} and {b[name]!r}"
    return "equal" if len(first) == len(second) else f"{len(first)} steps and {len(second)}"
