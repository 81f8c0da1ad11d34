"""Runs of one mode at several loss scales, side by side."""

from pathlib import Path

import pytest

from roundoff.errors import UsageError
from roundoff.report.summary import table
from roundoff.runs.reading import read_run
from roundoff.verdict.comparison import compare
from roundoff.verdict.types import Comparison
from synthetic import make_run


def comparison(folder: Path, *runs: tuple[str, float | None, int], reference: str | None = None) -> Comparison:
    paths = [
        make_run(folder / str(i), label, seed, precision={"loss_scale": scale})
        for i, (label, scale, seed) in enumerate(runs)
    ]
    return compare([read_run(path) for path in paths], reference=reference)


def test_each_scale_is_a_mode_with_its_seeds(tmp_path: Path) -> None:
    runs = [("manual", scale, seed) for scale in (1.0, 128.0, 0.1, 2.0**-8, 2.0**17) for seed in (1, 2)]
    found = comparison(tmp_path, ("fp32", 1.0, 1), ("fp32", 1.0, 2), *runs)
    assert {mode.label: [run.seed for run in mode.runs] for mode in found.modes} == {
        label: [1, 2] for label in ("fp32", *(f"manual-scale-{scale}" for scale in ("1", "128", "0.1", "2^-8", "2^17")))
    }
    assert all(mode.verdict.pairs == 2 for mode in found.modes)
    assert "manual-scale-0.1" in table(found)


def test_a_dynamic_scale_beside_a_static_one(tmp_path: Path) -> None:
    found = comparison(tmp_path, ("amp-fp16", None, 1), ("amp-fp16", 1024.0, 1), reference="amp-fp16-scale-1024")
    assert [mode.label for mode in found.modes] == ["amp-fp16-scale-1024", "amp-fp16-dynamic"]


def test_one_scale_leaves_the_name_as_it_is(tmp_path: Path) -> None:
    """Whatever other modes run at."""
    found = comparison(tmp_path, ("manual", 1.0, 1), ("manual", 1.0, 2), ("amp-fp16", None, 1), ("amp-fp16", None, 2))
    assert [mode.label for mode in found.modes] == ["manual", "amp-fp16"]


def test_the_same_scale_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are both manual-scale-1 with seed 1"):
        comparison(tmp_path, ("manual", 1.0, 1), ("manual", 1.0, 1), ("manual", 2.0, 1))
