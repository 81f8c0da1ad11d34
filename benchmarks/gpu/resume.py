"""The part "resume": runs that die by kill -9 after a checkpoint, and go on, against runs that nobody stopped."""

from benchmarks.gpu.bits import first_difference
from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.trainers import Run, Trainers
from lm.options.modes import MODES
from lm.options.options import words

CASES = tuple((mode, dropout) for dropout in (0.0, 0.2) for mode in ("fp32", "fp16-optimizer-dynamic", "amp-bf16"))
ON_A_CPU = (("fp16-optimizer-dynamic", 0.2),)
STEPS, FEW_STEPS = 200, 10
FIELDS = ("loss", "grad_norm", "loss_scale", "applied", "lr")


def run(report: Report, settings: Settings) -> None:
    """Compare each case."""
    trainers = Trainers(settings)
    cases = ON_A_CPU if settings.small else CASES
    steps = FEW_STEPS if settings.small else STEPS
    ended = trainers.at_once(lambda case: pair(trainers, case[0], case[1], steps), cases)
    for (mode, dropout), runs in zip(cases, ended, strict=True):
        name = f"{mode} with dropout {dropout:g}, resumed after kill -9, beside the run that was never stopped"
        with report.guarded(name):
            if isinstance(runs, Exception):
                raise runs
            report.check(name, difference(*runs), "equal", required=True)


def pair(trainers: Trainers, mode: str, dropout: float, steps: int) -> tuple[Run, Run]:
    """Return a run that nobody stopped, and one that was killed half way and resumed."""
    script = f"{MODES[mode].script}.py"
    how = {"dropout": dropout, "max_steps": steps, "checkpoint_interval": steps // 2, "deterministic": True}
    options = words({**MODES[mode].options, **how})
    whole = trainers.train(f"{mode}-{dropout}-whole", script, *options)
    killed = trainers.train(f"{mode}-{dropout}-killed", script, *options, die=True)
    return whole, trainers.resume(killed, script)


def difference(whole: Run, resumed: Run) -> str:
    """Return "equal", or what the two runs differ in: a step, the test loss or the model."""
    steps = first_difference(whole, resumed, FIELDS)
    if steps != "equal":
        return steps
    losses = [run.result()["test_loss"] for run in (whole, resumed)]
    if losses[0] != losses[1]:
        return f"equal steps, but test losses {losses[0]!r} and {losses[1]!r}"
    return "equal" if whole.model == resumed.model else "equal steps, but other bytes in the model"
