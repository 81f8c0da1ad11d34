"""The gradients that are compared: the reference's is autograd's, and a mode's is that which its trainer computes."""

import re
from pathlib import Path

import lm.launch.probing.build
import pytest
import torch
import torch.nn.functional as F
from test_house import FENCE, ROOT, SCRIPTS

from jobs import MODES as TRAINERS
from jobs import SIZE, build
from lm.data.corpus import get_batch
from lm.launch.probing.boundaries import LOGITS, tensor_names, watch
from lm.launch.probing.mode import PROBED, Mode
from lm.launch.probing.reference import Reference
from lm.model.decoder_loss import logits_of
from lm.model.language_model import KINDS, RNNModel, next_word_loss
from lm.options.modes import MODES
from roundoff.precision import Autocast, MasterWeights

WORDS = 24


def make_model(kind: str = "LSTM", tied: bool = False, nlayers: int = 3) -> RNNModel:
    torch.manual_seed(5)
    return RNNModel(kind, WORDS, 8, 8, nlayers, 0.4, tied, context=6)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(WORDS, (7, 4), generator=torch.Generator().manual_seed(1))
    return words[:-1], words[1:].flatten()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_precision_is_built_as_its_script_builds_it(name):
    fence = FENCE.search((ROOT / name).read_text()).group()
    source = Path(lm.launch.probing.build.__file__).read_text()
    body = re.search(rf"def _{Path(name).stem}\(.*?\n(.*?)    return precision", source, re.DOTALL).group(1)
    assert body == "".join(fence.strip("\n").splitlines(keepends=True)[1:-1])


def cases():
    for kind in KINDS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            yield kind, dtype, False
        yield kind, torch.bfloat16, True
        yield kind, torch.float16, True


@pytest.mark.parametrize(("kind", "dtype", "autocast"), list(cases()))
def test_watching_changes_no_bit(kind, dtype, autocast):
    found = []
    for watched in (False, True):
        model = make_model(kind).train()
        model = model if autocast else model.to(dtype)
        boundaries = watch(model) if watched else {}
        torch.manual_seed(3)
        tokens, targets = batch()
        with torch.autocast("cpu", dtype, enabled=autocast):
            features, hidden = model.features(tokens, model.init_hidden(4))
            loss = F.cross_entropy(
                model.decoder(features.to(model.decoder.weight.dtype)).flatten(0, 1).float(), targets
            )
        loss.backward()
        found.append(
            [loss, *(hidden if isinstance(hidden, tuple) else [hidden]), *(p.grad for p in model.parameters())]
        )
        assert [*boundaries] == (["layer 2", "layer 1", "layer 0", "embedding"] if watched else [])
        assert all(gradient.shape == (6, 4, 8) and gradient.count_nonzero() for gradient in boundaries.values())
        found[-1].append(torch.rand(1))
    assert all(same_bits(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_autograd_in_float64(kind, tied, monkeypatch):
    monkeypatch.setattr("lm.launch.probing.reference.SLICE_BYTES", 8 * WORDS * 5)  # 24 rows in slices of 5
    model, (tokens, targets) = make_model(kind, tied), batch()
    seen = []
    reference = Reference(model)
    torch.manual_seed(3)
    after = reference.run(tokens, targets, reference.init_hidden(4), lambda part: seen.append(part.clone()))
    plain = make_model(kind, tied).double().train()
    torch.manual_seed(3)
    features, hidden = plain.features(tokens, plain.init_hidden(4))
    logits = F.linear(features, plain.decoder.weight, plain.decoder.bias).flatten(0, 1)
    logits.retain_grad()
    F.cross_entropy(logits, targets).backward()
    assert torch.allclose(torch.cat(seen), logits.grad, rtol=1e-12, atol=1e-16)
    assert max(map(len, seen)) == 5
    for name, parameter in plain.named_parameters():
        gradient, rows = reference.gradients()[name]
        assert (rows is None) == (tied or name != "encoder.weight")
        whole = gradient if rows is None else torch.zeros_like(parameter).index_add_(0, rows, gradient)
        assert torch.allclose(whole, parameter.grad, rtol=1e-11, atol=1e-15), name
    for kept, state in zip(after, hidden, strict=True):
        assert torch.equal(kept, state)
        assert not kept.requires_grad


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_the_gradient_that_its_trainer_has(name, monkeypatch, corpus):
    monkeypatch.chdir(corpus.parent)  # where the trainers begin their runs
    training = build(monkeypatch, corpus, *TRAINERS[name])
    mode = Mode(name, ["--data", str(corpus), *SIZE])
    tokens, targets = get_batch(training.train_data, 0, 5)
    torch.manual_seed(9)
    fresh = build(monkeypatch, corpus, "main").model
    state = tuple(torch.rand(2, 4, 16, dtype=torch.float64) for _ in "hc")
    torch.manual_seed(4)
    found = mode.gradients(fresh, tokens, targets, state)
    torch.manual_seed(4)
    model, precision = training.model.train(), training.precision
    with precision.forward():
        hidden = tuple(h.to(t.dtype) for h, t in zip(state, model.init_hidden(4), strict=True))
        loss, _ = next_word_loss(model, tokens, targets, hidden)
    precision.backward(loss)
    trained = dict(model.named_parameters())
    assert found.parameters.keys() == trained.keys()
    for parameter, gradient in found.parameters.items():
        assert same_bits(gradient, trained[parameter].grad), parameter
    assert found.boundaries.keys() == {n for n, kind in tensor_names(model).items() if kind == "boundary"}
    assert float(precision.step(0.25).loss_scale) == mode.scale
    assert all(p.grad is None for p in fresh.parameters())


def test_the_default_leaves_out_what_is_the_same():
    assert set(PROBED) <= set(MODES)
    assert len(PROBED) == 5


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_the_logits_is_that_of_the_formula(monkeypatch, dtype, instructions):
    monkeypatch.setattr("lm.model.kernels.cpu_multiplies", lambda _: instructions)
    model, (tokens, targets) = make_model(), batch()
    model.eval()
    if dtype is torch.float16:
        precision = MasterWeights(model.half().parameters(), torch.optim.SGD(model.parameters(), 1.0), 128.0)
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        precision = Autocast(torch.optim.SGD(model.parameters(), 1.0), scaler, "cpu", dtype, 128.0)
    with precision.forward(), torch.no_grad():
        logits, _ = model(tokens, model.init_hidden(4))
    with precision.forward():
        loss, _ = next_word_loss(model, tokens, targets, model.init_hidden(4))
    buffer = logits_of(loss)
    precision.backward(loss)
    probabilities = torch.softmax(logits.flatten(0, 1).float(), 1)
    expected = (probabilities - F.one_hot(targets, WORDS)) * (128.0 / len(targets))
    assert buffer.dtype == (dtype if instructions else torch.float32)
    assert torch.equal(buffer.float(), buffer.to(dtype).float())
    eps = torch.finfo(dtype).eps
    assert torch.allclose(buffer.float(), expected, rtol=2 * eps, atol=1e-6)


def test_tensors_are_in_forward_order():
    assert list(tensor_names(make_model(nlayers=2))) == [
        "encoder.weight", "embedding",
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "layer 0",
        "rnn.weight_ih_l1", "rnn.weight_hh_l1", "rnn.bias_ih_l1", "rnn.bias_hh_l1", "layer 1",
        "decoder.weight", "decoder.bias", "logits",
    ]  # fmt: skip
    names = list(tensor_names(make_model("Transformer", nlayers=12)))
    assert names.index("layer 1") < names.index("rnn.layers.2.linear1.weight") < names.index("layer 2")
    assert names.index("layer 10") < names.index("rnn.layers.11.norm2.bias") < names.index("layer 11")
    assert names[-1] == LOGITS
