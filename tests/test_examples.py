"""The examples do what they say, and the seam serves a model that is no language model."""

import contextlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

pytest.importorskip("matplotlib", reason="this environment lacks matplotlib, of the extra report")

import matplotlib
import torch
import torch.nn.functional as F

from jobs import mostly_slow
from programs import ROOT, read_run
from roundoff import Autocast
from roundoff.modes import named


def load(name: str) -> ModuleType:
    """Run an example; one that has a notebook from the notebook's cells."""
    notebook = ROOT / "examples" / f"{name}.ipynb"
    if notebook.exists():
        module = ModuleType(f"example_{name}")
        exec("\n".join(cells(notebook, "code")), vars(module))  # noqa: S102
        return module
    spec = importlib.util.spec_from_file_location(f"example_{name}", notebook.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(notebook: Path, kind: str) -> list[str]:
    """Return the source of each cell of a kind, "code" or "markdown"."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


class Ran(NamedTuple):
    """An example that has run, and what it printed."""

    module: ModuleType
    printed: str

    def row(self, mode: str) -> tuple[float, float | None, str]:
        """Return training loss, difference and verdict of `mode` in the comparison's table."""
        pattern = rf"^{mode} +(\w+) +(?:([-+][\d.]+) \[.*?\]|-) +([\d.]+) "
        verdict, difference, loss = re.search(pattern, self.printed, re.MULTILINE).groups()
        return float(loss), difference and float(difference), verdict

    def total(self, mode: str) -> dict[str, Any]:
        """Return the probe's figures of all parameters in `mode`."""
        return self.module.report.result["modes"][mode]["total"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    @cache
    def run(name: str) -> Ran:
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp(name)))
            return Ran(load(name), printed.getvalue())

    return run


@pytest.mark.parametrize("kind", ["code", "markdown"])
def test_the_notebook_is_the_example(kind: str) -> None:
    """`make notebook` writes it anew."""
    jupytext = pytest.importorskip("jupytext", reason="this environment lacks jupytext, of the extra dev")
    script = jupytext.read(ROOT / "examples" / "cnn.py")
    written = [cell["source"] for cell in script["cells"] if cell["cell_type"] == kind]
    assert cells(ROOT / "examples" / "cnn.ipynb", kind) == written
    assert len(written) > 3


@pytest.mark.parametrize("name", mostly_slow(["cnn", "gpt", "tabular"]))
def test_an_example_is_probed_and_compared(name, ran) -> None:
    example = ran(name)
    folder = example.module.folder
    pages = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"probe.json", "probe.html", "probe.png"}
    if name == "cnn":
        expected = {f"probe/{page}" for page in expected}
        expected |= {f"comparison/{page}" for page in ("summary.json", "report.html", "curves.png")}
    assert pages == expected
    assert str(folder) in example.printed
    assert str(example.module.report) in example.printed
    assert [example.row(mode)[2] == "reference" for mode in example.module.MODES][:2] == [True, False]


def plain_loop(cnn: ModuleType) -> list[float]:
    torch.manual_seed(0)
    model = cnn.CNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=cnn.LR, momentum=cnn.MOMENTUM)
    losses = []
    for images, labels in cnn.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cnn.MAX_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses


def amp_fp32(model: torch.nn.Module, optimizer: Any) -> Autocast:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    return Autocast(optimizer(list(model.parameters())), scaler, "cpu", torch.float32, 1.0)


@pytest.mark.slow
def test_a_cnn_learns_in_every_mode_and_in_fp32_as_by_plain_pytorch(ran) -> None:
    """Half weights have 11 bits, bfloat16 products 8: the start shows how many were kept."""
    cnn = ran("cnn").module
    expected = plain_loop(cnn)
    assert cnn.train(amp_fp32, 0) == expected
    losses = {name: cnn.train(build, 0) for name, build in named(cnn.MODES).items()}
    assert losses["fp32"] == expected
    assert losses["masters-fp16"] == losses["fp16-optimizer"]
    for name, found in losses.items():
        error = {"fp32": 0.0, "amp-bf16": 2.0**-7}.get(name, 2.0**-10)
        assert found[0] == pytest.approx(expected[0], rel=error)
        assert (found[0] == expected[0]) == (error == 0)
        assert found[0] > 1.2
        assert sum(found[-10:]) / 10 < 0.05
        assert ran("cnn").total(name)["error_to_noise"] < 0.1
    assert ran("cnn").total("masters-fp16") == ran("cnn").total("fp16-optimizer")


@pytest.mark.slow
def test_a_gpt_trains_alike_in_every_mode(ran) -> None:
    gpt = ran("gpt")
    for mode in gpt.module.MODES[1:]:
        loss, difference, _ = gpt.row(mode)
        assert loss < 3.6 < math.log(gpt.module.VOCABULARY) - 1
        assert abs(difference) < 0.01
        assert gpt.total(mode)["error_to_noise"] < 0.01
        assert gpt.total(mode)["critical_batch"] > (1e4 if mode == "amp-bf16" else 1e5)


@pytest.mark.slow
def test_half_weights_without_masters_train_a_table_worse(ran) -> None:
    table = ran("tabular")
    without, masters = table.total("bf16-weights"), table.total("masters-bf16")
    assert without["stagnated"] > 0.9
    assert without["error_to_noise"] == pytest.approx(masters["error_to_noise"], rel=0.01)
    assert table.row("bf16-weights")[2] == "worse"
    assert table.row("bf16-weights")[1] > 10 * abs(table.row("masters-bf16")[1])


@pytest.mark.slow
def test_torch_amp_repeats_apex(ran) -> None:
    """O1 and autocast cast the same products of this model, and both loss scales move alike, overflows included."""
    example = ran("from_apex")
    assert [example.row(mode)[2] for mode in example.module.MODES[:3]] == ["reference", "equivalent", "equivalent"]
    differs_at_step = dict(re.findall(r"^(\S+) +(none|\d+) ", example.printed, re.MULTILINE))
    assert differs_at_step["amp-fp16"] == "none" != differs_at_step["apex-o2"]


@pytest.mark.slow
def test_two_modes_are_trained_and_plotted(monkeypatch, tmp_path, capsys):
    matplotlib.use("Agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    example = load("two_modes")
    lines = {line.get_label().partition(",")[0]: line for line in example.axis.lines}
    losses = {}
    for name, dtype in {"fp32": "float32", "amp-bf16": "bfloat16"}.items():
        run = read_run(example.folder / name)
        losses[name] = [row["loss"] for row in run.steps]
        assert run.config["precision"]["dtypes"]["logits"] == dtype
        assert lines[name].get_label() == f"{name}, test perplexity {run.result['test_ppl']:.0f}"
        assert lines[name].get_xdata().tolist() == list(range(1, 101))
        assert lines[name].get_ydata().tolist() == losses[name]
        assert sum(losses[name][-10:]) < sum(losses[name][:10]) - 10
    assert losses["fp32"] != losses["amp-bf16"]
    assert losses["fp32"][0] == pytest.approx(losses["amp-bf16"][0], rel=2.0**-7)
    assert (example.folder / "two_modes.png").read_bytes().startswith(b"\x89PNG")
    assert example.folder.parent == tmp_path
    example.plt.close(example.figure)
