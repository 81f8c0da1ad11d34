"""Probes the initial and the final weights of a comparison's reference, each by probe.py in a process of its own.

What they find is below the comparison's folder: `probes/<label>-<seed>-initial` and `-final`, with a log beside each.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.launch import jobs as launch
from lm.launch.jobs import Job, comparison_folder, run_jobs
from lm.launch.probing.sources import OF_JOB, loss_scales
from lm.options.options import make_parser
from lm.training.checkpoint import command_of
from roundoff.cli import as_flags
from roundoff.errors import UsageError
from roundoff.gradients.result import read_probe
from roundoff.gradients.statistics import LEAST_BATCHES
from roundoff.runs.jsonfile import read_object
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison, Probe

BATCHES = 32


@dataclass(frozen=True)
class ProbeJob(Job):
    """One probe to make; `flags` are those of probe.py that say what is probed.

    Attributes:
        modes: labels of the modes to probe.
    """

    modes: Sequence[str]

    @property
    def command(self) -> list[str]:
        """What is run, word by word."""
        script = [sys.executable, str(launch.SCRIPTS / "probe.py")]
        return [*script, "--modes", ",".join(self.modes), "--out", str(self.run_dir), *self.flags]

    def found(self) -> dict[str, Any] | None:
        """What the probe found; None unless the directory holds this very one."""
        try:
            result = read_probe(self.run_dir / "probe.json")
        except UsageError:
            return None
        same = result["environment"].get("command") == ["probe.py", *self.command[2:]]
        return result if same and list(result["modes"]) == list(self.modes) else None

    def result(self) -> dict[str, Any] | None:
        """How the probe ended; None where it did not."""
        return None if self.found() is None else {"status": "finished"}

    def started(self) -> bool:
        """A probe cannot be gone on with."""
        return False


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
    jobs = _jobs(out, comparison.modes[0].runs[0], [mode.label for mode in comparison.modes if mode.runs])
    with comparison_folder(out, read_object(out / "compare.json")) as lock:
        (out / "probes").mkdir(exist_ok=True)
        failures = {failure.label: failure.message for failure in run_jobs(jobs, [{}], lock)}
    return [
        Probe(f"The gradient at the {job.label.split()[1]} weights", job.run_dir, job.found(), failures.get(job.label))
        for job in jobs
    ]


def _jobs(out: Path, run: Run, modes: list[str]) -> list[ProbeJob]:
    config, folder = run.config, out / "probes"
    options = make_parser("main", None).options()
    rows = config["corpus"]["train_tokens"] // config["batch_size"]
    job = {name: config[name] for name in OF_JOB if name in config}
    job |= loss_scales(config["script"], command_of(run.path, config["script"]))
    batches = ["--batches", str(min(BATCHES, max(LEAST_BATCHES, (rows - 1) // config["bptt"])))]
    fresh = [
        *batches,
        "--data",
        config["data"],
        "--",
        *as_flags(options, job),
    ]
    return [
        ProbeJob(f"probe {when}", run.seed, flags, folder / f"{run.label}-{run.seed}-{when}", modes)
        for when, flags in (("initial", fresh), ("final", [*batches, "--run", str(run.path)]))
    ]
