"""probe.png: every mode and the window are drawn, and odd results too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from odd_probes import empty, extreme, nothing_known, of_tensors, renamed
from roundoff.report import curves
from roundoff.report.probe_png import _draw, write_png
from roundoff.report.probe_view import heat
from samples import KS, MODES, TENSORS, sample


def pixels(tmp_path: Path, result: dict[str, Any]) -> np.ndarray:
    write_png(tmp_path / "probe.png", result)
    assert [p.name for p in tmp_path.iterdir()] == ["probe.png"]  # nothing left beside it
    image = imread(tmp_path / "probe.png")[:, :, :3]
    assert image.shape[1] == 1600
    return image


def test_every_mode_is_drawn_in_its_colour_and_no_letter_is_cut_off(tmp_path: Path) -> None:
    image = pixels(tmp_path, sample())
    for i in range(len(MODES)):
        assert (np.abs(image - to_rgb(curves.style(i).colour)).max(axis=2) < 0.01).sum() > 500
    assert (image[[0, -1]] == 1).all()
    assert (image[:, [0, -1]] == 1).all()


def test_the_figures_drawn_are_those_of_the_result() -> None:
    result = sample()
    left, right = _draw(result).axes[:2]
    of_mode = result["modes"]["amp-bf16"]
    wanted = [of_mode["total"], *of_mode["tensors"].values()]
    (x,) = [
        line.get_xdata()
        for line in left.lines
        if line.get_marker() != "None" and line.get_color() == curves.style(4).colour
    ]
    assert list(x) == [values["error_to_noise"] for values in wanted if values["error_to_noise"] is not None]
    assert left.get_xscale() == "log"
    assert [label.get_text() for label in left.get_yticklabels()] == ["all parameters", *TENSORS]
    (mesh,) = right.collections
    assert np.array_equal(np.asarray(mesh.get_array()).reshape(len(TENSORS), len(KS)), heat(result))
    (frame,) = right.patches
    assert (frame.get_x(), frame.get_x() + frame.get_width()) == (5.5, 15.5)
    dots, *triangles = right.lines
    assert list(dots.get_xdata()) == [11, 11]
    assert [list(triangle.get_xdata()) for triangle in triangles] == [[7], [16]]


def test_without_a_window_there_is_no_frame() -> None:
    right = _draw(sample() | {"window": None, "scale": None}).axes[1]
    assert not right.patches
    assert "frame" not in right.get_title(loc="left")


@pytest.mark.parametrize(
    "make",
    [
        nothing_known,
        empty,
        extreme,
        lambda: of_tensors(1),
        lambda: of_tensors(40),
        lambda: renamed(lambda name: name + "$x^{$ 日本\n\x1b[31m<b>%s</b>"),
    ],
    ids=["nothing known", "empty", "extreme", "one tensor", "forty", "odd names"],
)
def test_odd_results_are_drawn_without_a_warning(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    assert pixels(tmp_path, make()).min() < 0.2


def test_equal_results_make_equal_pictures(tmp_path: Path) -> None:
    write_png(tmp_path / "a", of_tensors(1))
    write_png(tmp_path / "b", of_tensors(1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
