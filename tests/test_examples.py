"""The examples do what they say, and the seam serves a model that is no language model."""

import importlib.util
from types import ModuleType

import pytest

pytest.importorskip("matplotlib", reason="this environment lacks matplotlib, of the extra report")

import matplotlib
import torch
import torch.nn.functional as F

from jobs import bits
from programs import ROOT, read_run


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cnn = load("cnn")


def plain_loop() -> tuple[torch.nn.Module, list[float]]:
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
    return model, losses


@pytest.mark.parametrize("mode", ["fp32", "amp-fp32"])
def test_a_cnn_in_fp32_equals_plain_pytorch_in_every_bit(mode):
    (plain, expected), (model, losses) = plain_loop(), cnn.train(mode)
    assert losses == expected
    assert bits(list(model.parameters())) == bits(list(plain.parameters()))


@pytest.mark.parametrize("mode", cnn.MODES)
def test_a_cnn_learns_in_every_mode(mode, capsys):
    """Half weights have 11 bits, bfloat16 products 8: the start shows how many were kept."""
    (_, expected), (model, losses) = plain_loop(), cnn.train(mode)
    error = {"fp32": 0.0, "amp-fp32": 0.0, "amp-bf16": 2.0**-7}.get(mode, 2.0**-10)
    assert losses[0] == pytest.approx(expected[0], rel=error)
    assert (losses[0] == expected[0]) == (error == 0)
    assert losses[0] > 1.2
    assert sum(losses[-10:]) / 10 < 0.05
    half = mode.startswith(("manual", "fp16"))
    assert {p.dtype for p in model.parameters()} == {torch.float16 if half else torch.float32}


def test_manual_and_fp16_optimizer_agree_on_a_cnn():
    (manual, losses), (wrapped, others) = cnn.train("manual"), cnn.train("fp16-optimizer")
    assert losses == others
    assert bits(list(manual.parameters())) == bits(list(wrapped.parameters()))


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
