"""What a comparison costs, over the number of steps and of runs."""

import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.growth.axes import GrowthAxis
from benchmarks.measure import Cost
from benchmarks.processes import fresh
from roundoff.device import peak_memory_bytes
from roundoff.runs.directory import RunDirectory

MODES = ("fp32", "amp-bf16")
STEPS, RUNS = 10_000, 2  # while the other one grows
WRITTEN = 1_000  # steps of a run that a RunDirectory writes, at 0.1 ms each; longer runs repeat them


def measure_comparison(steps: int, runs: int) -> dict[str, Cost]:
    """Measure reading, comparing and drawing `runs` runs of `steps` steps each, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{mode}-{seed}") for seed in range(runs // len(MODES)) for mode in MODES]
        for path in paths:
            write_run(path, steps)
        return {"compare": fresh(compare_once, paths, Path(folder))}


def write_run(path: Path, steps: int) -> None:
    """Write a run directory of a loss that falls slowly, with noise; the folder's name is that of mode and seed."""
    mode, _, seed = path.name.rpartition("-")
    noise = np.random.default_rng([MODES.index(mode), int(seed)])
    with RunDirectory(path, job={"model": "none"}, mode=mode, seed=int(seed), device="cpu") as run:
        for step in range(1, min(steps, WRITTEN) + 1):
            run.step(7 * step**-0.05 + noise.normal(0, 0.1), grad_norm=noise.random(), lr=20.0)
        run.finish(test_loss=5 + noise.normal(0, 0.01))
    if steps > WRITTEN:
        _lengthen(path, steps)


def _lengthen(path: Path, steps: int) -> None:
    """Repeat the steps of a run up to `steps`."""
    rows = path / "steps.jsonl"
    first = f'{{"step": {WRITTEN}, '
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    assert lines[-1].startswith(first)
    rests = [line.partition(", ")[2] for line in lines]
    numbered = zip(range(1, steps + 1), itertools.cycle(rests), strict=False)
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"step": {step}, {rest}' for step, rest in numbered)
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    (path / "result.json").write_text(json.dumps(result | {"steps": steps}), encoding="utf-8")


def compare_once(paths: list[Path], out: Path) -> Cost:
    """Compare the runs as `roundoff compare` does, and write its report to `out`."""
    start = time.perf_counter()
    from roundoff.report.compare_command import write_files  # here, as below: their imports are of a comparison
    from roundoff.runs.reading import read_run
    from roundoff.verdict.comparison import compare_runs

    write_files(out, compare_runs([read_run(path) for path in paths]))
    return Cost([time.perf_counter() - start], peak_memory_bytes("cpu") / 2**20)


AXES = {
    "compare-steps": GrowthAxis(
        f"steps of each of {RUNS} runs",
        (1_000, 10_000, 100_000, 1_000_000),
        lambda value: measure_comparison(value, RUNS),
        "compare",
    ),
    "compare-runs": GrowthAxis(
        f"runs of {STEPS:,} steps",
        (2, 6, 12, 24),
        lambda value: measure_comparison(STEPS, value),
        "compare",
    ),
}
