"""The probes of a comparison: of the reference's initial and final weights, each by probe.py in a process of its own.

The results are below the comparison's folder: `probes/<label>-<seed>-initial` and `-final`, with a log beside each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.launch.jobs import Job, comparison_folder, python, run_jobs
from lm.launch.probing.flags import job_options
from lm.options.config import stored_options
from lm.options.options import words
from roundoff.errors import UsageError
from roundoff.gradients.result import read_probe
from roundoff.gradients.statistics import LEAST_BATCHES
from roundoff.runs.jsonfile import read_object
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison, Probe

BATCHES = 32


@dataclass(frozen=True)
class ProbeJob(Job):
    """A probe.

    Attributes:
        modes: labels of the modes to probe.
        flags: of probe.py, that say what is probed.
    """

    modes: Sequence[str]
    flags: Sequence[str]

    @property
    def command(self) -> list[str]:
        """See `Job.command`."""
        return [*python("probe"), "--modes", ",".join(self.modes), "--out", str(self.run_dir), *self.flags]

    def found(self) -> dict[str, Any] | None:
        """Return the content of probe.json; None unless the directory holds this very probe."""
        try:
            result = read_probe(self.run_dir / "probe.json")
        except UsageError:
            return None
        same = result["environment"].get("command") == ["probe.py", *self.command[2:]]
        return result if same and list(result["modes"]) == list(self.modes) else None

    def result(self) -> dict[str, Any] | None:
        """See `Job.result`."""
        return None if self.found() is None else {"status": "finished"}


def run_probes(out: Path, comparison: Comparison) -> list[Probe]:
    """Probe the weights that the reference's first run began and ended with, unless that was done before.

    A probe that fails leaves the other alone.

    Args:
        out: folder of the comparison.
        comparison: of the runs in it; those of its modes are probed that left a run.

    Raises:
        UsageError: somebody else uses the folder.
        KeyboardInterrupt: after an interrupt.
    """
    if not comparison.modes[0].runs:
        return []
    plan = read_object(out / "compare.json")
    asked = plan.get("options", {})
    # That of the reference is no part of its options where its own scale is static.
    scale = {"init_scale": asked["init_scale"]} if "init_scale" in asked else {}
    jobs = _jobs(out, comparison.modes[0].runs[0], [mode.label for mode in comparison.modes if mode.runs], scale)
    with comparison_folder(out, plan) as lock:
        (out / "probes").mkdir(exist_ok=True)
        failures = {failure.label: failure.message for failure in run_jobs(jobs, [{}], lock)}
    return [
        Probe(f"The gradient at the {job.label.split()[1]} weights", job.run_dir, job.found(), failures.get(job.label))
        for job in jobs
    ]


def _jobs(out: Path, run: Run, modes: list[str], scale: dict[str, Any]) -> list[ProbeJob]:
    """Return the probes of `run` in `modes`; `scale` is where a dynamic loss scale starts, if that was asked for."""
    job, folder = run.config["job"], out / "probes"
    options = job_options(stored_options(run.path, run.config["options"]["script"]) | scale)
    rows = job["corpus"]["train_tokens"] // job["batch_size"]
    batches = ["--batches", str(min(BATCHES, max(LEAST_BATCHES, (rows - 1) // job["bptt"])))]
    fresh = [*batches, "--data", run.config["options"]["data"], "--", *words(options)]
    final = [*batches, "--run", str(run.path), *(["--", *words(scale)] if scale else [])]
    return [
        ProbeJob(f"probe {when}", run.seed, folder / f"{run.label}-{run.seed}-{when}", modes, flags)
        for when, flags in (("initial", fresh), ("final", final))
    ]
