import math
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from comparisons import make_comparison, make_run
from roundoff.report import curves
from roundoff.report.png import _draw, write_png
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison, Failure

RAGGED = [make_run("fp32", losses=[6.0] * 3), make_run("manual", losses=[6.0], epochs=[])]


def pixels(tmp_path: Path, comparison: Comparison) -> np.ndarray:
    path = tmp_path / "curves.png"
    write_png(path, comparison)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]  # nothing left beside it
    image = imread(path)[:, :, :3]
    assert image.shape[1] == 1600
    return image


def count(image: np.ndarray, colour: str) -> int:
    """Pixels of a colour, give or take a hundredth."""
    return int((np.abs(image - to_rgb(colour)).max(axis=2) < 0.01).sum())


def test_every_mode_is_drawn_in_its_colour_and_no_letter_is_cut_off(tmp_path: Path) -> None:
    names = ["fp32", "manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16", "amp-fp32", "x" * 60]
    runs = [make_run(name, losses=[6.0 - 0.1 * i, 5.0 + 0.2 * i, 4.5 - i / 5]) for i, name in enumerate(names)]
    image = pixels(tmp_path, make_comparison(runs))
    for i in range(8):
        assert count(image, curves.style(i).colour) > 500, names[i]
    assert (image[[0, -1]] == 1).all()
    assert (image[:, [0, -1]] == 1).all()


def test_the_band_of_the_references_seeds_is_drawn(tmp_path: Path) -> None:
    grey = "#dedede"  # black with an opacity of 0.13, on white
    seeds = [make_run("fp32", seed, [6.0 + seed, 5.0 + seed]) for seed in range(3)]
    assert count(pixels(tmp_path, make_comparison(seeds)), grey) > 50_000
    assert count(pixels(tmp_path, make_comparison(seeds[:1])), grey) < 500


@pytest.mark.parametrize("epochs", [[5.5], [5.5, 5.0], [5.0] * 40])
def test_epochs_are_whole_numbers_on_their_axis(epochs) -> None:
    figure = _draw(make_comparison([make_run("fp32", epochs=epochs), make_run("manual", epochs=epochs)]))
    axis = next(axis for axis in figure.axes if axis.get_xlabel() == "epoch")
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


def test_panels_are_those_that_have_something_to_draw(tmp_path: Path) -> None:
    one, two = make_run("fp32", epochs=[]), make_run("manual")
    dynamic = make_run("amp-fp16", scales=[4.0, 2.0, 2.0, 2.0], applied=[False, True, True, True])
    heights = [pixels(tmp_path, make_comparison(runs)).shape[0] for runs in ([one], [one, two], [one, dynamic])]
    assert heights[0] < 700  # loss
    assert heights[1] == heights[2] == heights[0] + 2 * 448  # and difference, and validation with or without loss scale


@pytest.mark.parametrize(
    "runs",
    [
        [make_run("fp32", losses=[6.0], epochs=[])],
        [make_run("fp32", losses=[math.nan] * 4), make_run("manual", losses=[math.inf] * 4, epochs=[math.inf])],
        [make_run("fp32", losses=[6.0, 3e38]), make_run("manual", losses=[6.0, 3e38], status="diverged")],
        [make_run("fp32"), make_run("manual", seed=2)],
        [make_run("fp32"), make_run("manual", scales=[math.inf, 0.0, math.nan, -1.0])],
        [make_run(name) for name in ("$x^{$", "_hidden", "日本\n\x1b[31m", "<b>%s</b>", "\ud800")],
        [make_run(f"mode-{i}") for i in range(20)],
        RAGGED,
    ],
    ids=["one step", "nothing finite", "huge", "no common seed", "odd scales", "odd names", "20 modes", "ragged"],
)
def test_odd_runs_are_drawn_without_a_warning(tmp_path: Path, runs: list[Run]) -> None:
    assert pixels(tmp_path, make_comparison(runs)).min() < 0.2


def test_failures_alone_make_a_picture_that_says_so(tmp_path: Path) -> None:
    image = pixels(tmp_path, make_comparison([], [Failure("fp32", 1, ["x"], 1, "error")]))
    assert image.shape[0] == 320
    assert count(image, "#000000") > 100


def test_a_long_run_is_drawn_from_few_points(tmp_path: Path) -> None:
    losses = [5.0 + (i % 7) / 7 for i in range(30_000)]
    runs = [make_run(f"mode-{i}", losses=losses, scales=[2.0 ** (j % 3) for j in range(30_000)]) for i in range(3)]
    pixels(tmp_path, make_comparison(runs))
    at, _, _ = curves.loss_scale(runs[0])
    assert len(at) == 2 * curves.POINTS
    assert (at[0], at[-1]) == (1, 30_000)


@pytest.mark.slow
def test_matplotlibs_own_state_stays_as_it_is(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    write_png(tmp_path / "curves.png", make_comparison([make_run("fp32")]))
    assert dict(mpl.rcParams) == before
    program = "import sys, roundoff.report.png, roundoff.report.html; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
