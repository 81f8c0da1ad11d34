"""10,000 steps with hundreds of faults in every mode: nothing grows, nothing sinks to 0, no row is missing."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import soak
from lm.options.modes import DEFAULT_MODES
from programs import ROOT, read_run

LOWEST, HIGHEST = -100, {"amp-fp16": 127, "fp16-optimizer-dynamic": 24}
STATIC = {"manual": 128.0, "fp16-optimizer": 128.0}


@pytest.fixture(scope="module")
def run_soak() -> Iterator[Callable[[str, Path], int]]:
    """Runs one soak in a fresh process; starting Python and torch is paid for once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(soak.__file__)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:

        def run(mode: str, folder: Path) -> int:
            print(json.dumps([mode, str(folder)]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", DEFAULT_MODES)
def test_a_long_run_stays_as_it_is(run_soak, tmp_path, mode) -> None:
    assert run_soak(mode, tmp_path) == 0
    run, faults = read_run(tmp_path / "run"), soak.plan()
    assert [row["step"] for row in run.steps] == list(range(1, 10_001))
    assert {row["step"] for row in run.steps if not row["applied"]} == set(faults)
    counts = (run.result["status"], run.result["steps"], run.result["skipped"])
    assert counts == ("finished", 10_000, len(faults))

    exponent, good = 0, 0
    for row in run.steps:
        assert row["loss_scale"] == (2.0**exponent if mode in HIGHEST else STATIC.get(mode, 1.0)), row
        good = 0 if row["step"] in faults else good + 1
        if row["step"] in faults:
            exponent = max(exponent - 1, LOWEST)
        elif good == soak.WINDOW:
            exponent, good = min(exponent + 1, HIGHEST.get(mode, 0)), 0

    losses = [row["loss"] for row in run.steps if row["applied"]]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-500:]) < sum(losses[:500])
    assert math.isfinite(run.result["test_loss"])

    memory = json.loads((tmp_path / "memory.json").read_text())
    assert len(memory) == 10_000 // soak.MEASURE_EVERY
    settled = memory[1_000 // soak.MEASURE_EVERY - 1]
    assert max(memory) < 1.02 * settled


def test_the_faults_of_a_soak_are_as_many_and_as_long_as_they_should_be() -> None:
    faults = soak.plan()
    steps = sorted(faults)
    ends = [step for step in steps if step + 1 not in faults]
    starts = [step for step in steps if step - 1 not in faults]
    streaks = sorted(end - start + 1 for start, end in zip(starts, ends, strict=True))
    assert len(steps) > 600
    assert streaks[-2:] == [49, 300]
    assert {place for place, _ in faults.values()} == set(soak.PLACES)
