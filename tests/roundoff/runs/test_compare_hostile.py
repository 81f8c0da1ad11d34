"""Run directories made to do harm: each gets one clear line and the exit code of a mistake."""

import re

import pytest

from hostile_runs import RUNS
from programs import Programs
from synthetic import make_run


@pytest.mark.parametrize("name", RUNS)
def test_a_hostile_run_directory(programs: Programs, name: str) -> None:
    make_run(programs.folder / "run")
    RUNS[name].spoil(programs.folder / "run")
    error = programs.refuse("compare", "run", "--out", "out")  # nothing was written either
    assert re.search(RUNS[name].said, error), error
    assert error[:-1].isprintable()
