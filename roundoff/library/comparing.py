"""`compare`: train a model in several precision modes, and judge whether they train alike."""

import math
import operator
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from roundoff.errors import RunError, UsageError, described, printable
from roundoff.extras import require_report
from roundoff.modes import Build, named
from roundoff.precision import Precision, StepResult
from roundoff.runs.directory import FILES, RunDirectory
from roundoff.runs.files import lock, unlock
from roundoff.runs.given import loss_number
from roundoff.runs.jsonfile import as_read_back, read_object, unwritable
from roundoff.runs.reading import Run, read_run
from roundoff.runs.waiting import WaitingSteps
from roundoff.terminal import say
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.types import Comparison, Failure

COMPARED = ("fp32", "amp-fp16", "amp-bf16")

Train = Callable[[Build, int], Any]
"""`train(build, seed)` returns the losses of its steps, or a pair of these and the loss on the test data."""


class ComparisonReport:
    """Holds the figures of a comparison, and shows them.

    Attributes:
        comparison: its figures.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __str__(self) -> str:
        """Return the table with a verdict on each mode, and the sentences that explain it."""
        from roundoff.report.summary import table

        return table(self.comparison)

    def save(self, folder: str | Path) -> None:
        """Write summary.json, report.html and curves.png into `folder`, which is made.

        Raises:
            OSError: a file cannot be written.
        """
        from roundoff.report.compare_command import write_files

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, self.comparison)


def compare(
    train: Train,
    modes: Sequence[str | Build] | Mapping[str, str | Build] = COMPARED,
    seeds: int | Iterable[int] = 3,
    *,
    margin: float = 0.01,
    reference: str | None = None,
    job: Mapping[str, Any] | None = None,
    unit: str | None = None,
    folder: str | Path | None = None,
) -> ComparisonReport:
    """Train in each mode with each seed, one run after the other, and judge whether the modes train alike.

        def train(build, seed):
            torch.manual_seed(seed)                 # before the model: the same initial weights in each mode
            model = make_model()
            precision = build(model, lambda params: torch.optim.SGD(params, lr=0.05))
            losses = []
            for images, labels in batches(seed):
                model.zero_grad()
                with precision.forward():
                    loss = F.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), labels)
                precision.backward(loss)
                precision.step(max_norm=1.0)
                losses.append(loss.detach())
            return losses, test(model)

        print(compare(train, ["fp32", "amp-bf16"], seeds=5, margin=0.01))

    The verdicts compare the mean training loss of the second half of the steps, paired by seed. Where `train` returns
    test losses, their difference stands beside it. From three seeds on a mode is judged.

    Args:
        train: `train(build, seed)` seeds all that it draws, and makes a fresh model. It calls `build(model)`, or with a
            stock mode `build(model, make_optimizer)`, and trains with the `Precision` that it gets. It returns a loss
            for each step: a list of floats or of tensors with one element, or a tensor of shape (steps,). A pair
            `(losses, test_loss)` adds the loss on the test data. Each `precision.step` is recorded with its gradient
            norm, loss scale and whether it was applied; a loop that calls it must do so once for each loss.
        modes: names of stock modes (`roundoff.modes`), or a dict of name -> `Build`.
        seeds: how many, counted from 0, or the seeds themselves.
        margin: a difference this small is none, in the unit of the losses.
        reference: the mode that the others are compared with; by default fp32 if it is one of them, else the first.
        job: what is trained, such as {"model": "cnn", "lr": 0.05}; any mapping. It tells trainings apart: give another
            one when `train` changes, or `folder` returns the runs of the old `train`.
        unit: of the losses, as in `RunDirectory`.
        folder: where the runs are recorded, each in a run directory `<mode>-<seed>`. Runs of the same job, mode and
            seed that have finished there are read, and not trained again; the report counts them. None: none is kept.

    Returns:
        The report. A run whose `train` raised is in it as a failure.

    Raises:
        UsageError: a mode is unknown, another argument or what `train` returned is something else, or the folder holds
            runs of another job.
        RunError: every run failed.
        KeyboardInterrupt: at once; the runs that have finished stay in `folder`.
    """
    builds, numbers = named(modes), _seeds(seeds)
    if isinstance(margin, bool) or not (isinstance(margin, Real) and 0 < margin < math.inf):
        raise UsageError(f"margin={printable(repr(margin), 60)}: give a number above 0")
    _check_described(job, unit)
    if reference is not None and reference not in builds:
        raise UsageError(f"reference={reference!r} is none of the modes; there are {', '.join(builds)}")
    require_report()
    runs, failures, kept = list[Run](), list[Failure](), 0
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="roundoff-")))
        stack.callback(unlock, _take(place))
        for seed in numbers:
            for label, build in builds.items():
                made = _Training(place / f"{quote(label, safe=' +')}-{seed}", label, seed, job, unit)
                before = made.kept()
                kept += before is not None
                ended = before or made.run(train, build)
                if isinstance(ended, Failure):
                    failures.append(ended)
                else:
                    runs.append(ended)
                    _refuse_mixed(runs)
    if not runs:
        raise RunError(
            f"every run failed; the first one, {failures[0].label} with seed {failures[0].seed}: {failures[0].message}"
        )
    found = compare_runs(runs, failures, reference=reference, margin=float(margin))
    if kept:
        line = f"{kept} of {len(runs)} runs were kept from before. They show what `train` did then, with this `job`."
        found = replace(found, covers=[line, *found.covers])
    return ComparisonReport(found)


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    try:
        given: Iterable[Any] = seeds if isinstance(seeds, Iterable) else range(_index(seeds))
        found = [_index(seed) for seed in given]
    except TypeError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise UsageError(f"seeds={printable(repr(seeds), 60)}: give their number, or a list of different whole numbers")
    return found


def _index(value: Any) -> int:
    """Return a whole number of any kind, such as one of NumPy; raise TypeError for anything else."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _check_described(job: Any, unit: Any) -> None:
    """Refuse what no run can hold, before any has been trained."""
    if job is not None and (problem := unwritable(job, "job")):
        raise UsageError(problem)
    if not isinstance(job, Mapping | None):
        raise UsageError(f"job is {described(job)}; give a mapping")
    if not isinstance(unit, str | None):
        raise UsageError(f'unit is {described(unit)}; give a text, such as "nats a word"')


def _take(folder: Path) -> int | None:
    """Make `folder` and lock it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except BlockingIOError:
        raise UsageError(f"folder={folder} is in use by another comparison; wait for its end") from None
    except OSError as error:
        raise UsageError(f"folder={folder}: cannot write there ({error.strerror}); give another") from None


class _Training:
    """One mode with one seed."""

    def __init__(self, path: Path, label: str, seed: int, job: Mapping[str, Any] | None, unit: str | None) -> None:
        self.path = path
        self.label = label
        self.seed = seed
        self.job = dict(job or {})
        self.unit = unit

    def kept(self) -> Run | None:
        """Return the run that has finished before, if there is one; clear away one that has not.

        Raises:
            UsageError: the directory holds something else.
        """
        if not self.path.exists():
            return None
        try:
            config = read_object(self.path / "config.json")
            found = {"mode": config["precision"]["mode"], "seed": config["seed"], "job": config["job"]}
            found["unit"] = config.get("loss_unit")
        except (UsageError, OSError, LookupError, TypeError):
            raise UsageError(f"{printable(self.path)} holds something else than a run; give another folder") from None
        said = as_read_back({"mode": self.label, "seed": self.seed, "job": self.job, "unit": self.unit})
        if changed := [name for name, value in said.items() if value != found[name]]:
            raise UsageError(
                f"{printable(self.path)} holds a run of another {' and '.join(changed)}; give the same again, or "
                "another folder"
            )
        with suppress(UsageError):  # of a run that was killed while it was written
            run = read_run(self.path)
            if run.status == "finished":
                self._say(run, "kept")
                return run
        if more := {path.name for path in self.path.iterdir() if not path.name.startswith(".")} - set(FILES):
            raise UsageError(
                f"{printable(self.path)} holds {printable(min(more))} beside a run that has not finished; give another "
                "folder"
            )
        shutil.rmtree(self.path)
        return None

    def run(self, train: Train, build: Build) -> Run | Failure:
        """Train, and record what came of it."""
        start = time.monotonic()
        recorder = _Recorder(build)
        try:
            returned = train(recorder.build, self.seed)
        except Exception as error:
            reason = printable(f"{type(error).__name__}: {error}".rstrip(": "))
            say(f"| {printable(self.label, 22):22} | seed {self.seed} | failed      | {reason}")
            return Failure(self.label, self.seed, [], 1, reason)
        losses, test_loss = _losses_of(returned)
        steps = recorder.steps()
        if steps and len(steps) != len(losses):
            raise UsageError(
                f"train returned {len(losses)} losses, and precision.step was called {len(steps)} times; return one "
                "loss for each step"
            )
        said: dict[str, Any] = {"job": self.job, "mode": self.label, "seed": self.seed, "unit": self.unit}
        with RunDirectory(self.path, **said, device=recorder.device) as record:
            for loss, figures in zip(losses, steps or [{}] * len(losses), strict=True):
                record.step(loss, **figures)
            record.finish(test_loss)
        run = read_run(self.path)
        self._say(run, f"{time.monotonic() - start:.1f}s")
        return run

    def _say(self, run: Run, how: str) -> None:
        end = f"loss {run.steps['loss'][-1]:8.4f}" if run.test_loss is None else f"test loss {run.test_loss:8.4f}"
        say(f"| {printable(self.label, 22):22} | seed {self.seed} | {run.status:11} | {end} | {how}")


def _losses_of(returned: Any) -> tuple[list[float], float | None]:
    """Return the losses and the test loss of what `train` returned."""
    wanted = "return the losses of its steps, or a pair (losses, test_loss)"
    if returned is None:
        raise UsageError(f"train returned nothing; {wanted}")
    losses, test_loss = returned, None
    if isinstance(returned, tuple) and len(returned) == 2 and _is_sequence(returned[0]):
        losses, test_loss = returned
    if not _is_sequence(losses):
        raise UsageError(f"train returned {printable(repr(returned), 60)}; {wanted}")
    try:
        found = [float(loss.detach() if isinstance(loss, Tensor) else loss) for loss in losses]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(f"train returned losses that are no numbers ({printable(error, 80)}); {wanted}") from None
    if not found:
        raise UsageError(f"train returned no losses; {wanted}")
    try:
        return found, None if test_loss is None else loss_number("test_loss", test_loss)
    except UsageError:
        raise UsageError(f"train returned a test loss that is {described(test_loss)}; {wanted}") from None


def _refuse_mixed(runs: list[Run]) -> None:
    """Refuse a mode that took its steps by `precision` with one seed and not with another: it is two modes."""
    last = runs[-1]
    for run in runs:
        if run.label == last.label and _by_precision(run) != _by_precision(last):
            did, did_not = (run, last) if _by_precision(run) else (last, run)
            raise UsageError(
                f"train called precision.step in {printable(last.label)} with seed {did.seed}, and not with seed "
                f"{did_not.seed}; step by precision with every seed, or with none"
            )


def _by_precision(run: Run) -> bool:
    """Return whether the steps of `run` are those of a `Precision`, which knows the norm of each."""
    return not all(math.isnan(norm) for norm in run.steps["grad_norm"])


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


class _Recorder:
    """Keeps what every step of one training did.

    Attributes:
        device: of the model's parameters; None before a model is there.
    """

    def __init__(self, build: Build) -> None:
        self._build = build
        self._waiting = WaitingSteps()
        self.device: torch.device | None = None

    def build(self, model: nn.Module, *rest: Any, **options: Any) -> Precision:
        """Return what the mode makes of `model`, with steps that are recorded."""
        precision = self._build(model, *rest, **options)
        self.device = next((p.device for p in model.parameters()), None)
        self._waiting = WaitingSteps()
        return _Recorded(precision, self)

    def keep(self, result: StepResult, lr: Any) -> None:
        """Keep the outcome of a step, on the device."""
        row = {"step": 0, "epoch": 1, "lr": float(lr) if isinstance(lr, int | float) else math.nan}
        figures = (0.0, result.grad_norm, result.loss_scale, result.applied)
        self._waiting.add(row, figures, result.applied.device)

    def steps(self) -> list[dict[str, Any]]:
        """Return the outcome of each step as arguments of `RunDirectory.step`."""
        rows = self._waiting.fetch(lambda values: values) if len(self._waiting) else []
        return [{name: row[name] for name in ("grad_norm", "loss_scale", "applied", "lr")} for row in rows]


class _Recorded:
    """A `Precision` around another one that records its steps; see `Precision` for the members."""

    def __init__(self, precision: Precision, recorder: _Recorder) -> None:
        self._precision = precision
        self._recorder = recorder

    @property
    def optimizer(self) -> Optimizer:
        return self._precision.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._precision.param_groups

    def forward(self) -> AbstractContextManager[Any]:
        return self._precision.forward()

    def backward(self, loss: Tensor) -> None:
        self._precision.backward(loss)

    def step(self, max_norm: float) -> StepResult:
        groups = self._precision.param_groups
        lr = groups[0].get("lr") if groups else None  # before the step, which a scheduler may follow
        result = self._precision.step(max_norm)
        self._recorder.keep(result, lr)
        return result

    def state_dict(self) -> dict[str, Any]:
        return self._precision.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._precision.load_state_dict(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._precision, name)
