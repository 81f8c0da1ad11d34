"""The gradients that a probe of the language model compares, and its figures of a small model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs import MODES as TRAINERS
from jobs import bits
from lm.data.corpus import Corpus, batchify, get_batch
from lm.launch.probing.boundaries import LOGITS, tensor_names, watch
from lm.launch.probing.mode import Mode
from lm.launch.probing.reference import Batch, Reference
from lm.launch.probing.run import plan_scales
from lm.model.decoder_loss import logits_of
from lm.model.language_model import KINDS, RNNModel, next_word_loss
from lm.options.config import make_args
from lm.options.modes import MODES, PROBED
from lm.training.build import make_model
from probe import precisions
from programs import Programs
from roundoff.gradients.measure import Measurement, Plan
from roundoff.precision import Autocast, MasterWeights

WORDS = 24


def small_model(kind: str = "LSTM", tied: bool = False, nlayers: int = 3) -> RNNModel:
    torch.manual_seed(5)
    return RNNModel(kind, WORDS, 8, 8, nlayers, 0.4, tied, context=6)


def text() -> Tensor:
    return torch.randint(WORDS, (13, 4), generator=torch.Generator().manual_seed(1))


def states(hidden: Any) -> list[Tensor]:
    return list(hidden) if isinstance(hidden, tuple) else [hidden]


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.float64, False),
        *((d, a) for d in (torch.float16, torch.bfloat16) for a in (0, 1)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_no_bit(kind, dtype, autocast) -> None:
    found = []
    for watched in (False, True):
        model = small_model(kind).train().to(torch.float32 if autocast else dtype)
        boundaries = watch(model) if watched else {}
        torch.manual_seed(3)
        tokens, targets = get_batch(text(), 0, 6)
        with torch.autocast("cpu", dtype, enabled=bool(autocast)):
            features, hidden = model.features(tokens, model.init_hidden(4))
            logits = model.decoder(features.to(model.decoder.weight.dtype)).flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets)
        loss.backward()
        found.append(bits([loss, *states(hidden), *(p.grad for p in model.parameters()), torch.rand(1)]))
        assert [*boundaries] == (["layer 2", "layer 1", "layer 0", "embedding"] if watched else [])
        assert all(gradient.shape == (6, 4, 8) and gradient.count_nonzero() for gradient in boundaries.values())
    assert found[0] == found[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_autograd_in_float64_and_carries_its_state(kind, tied, monkeypatch) -> None:
    monkeypatch.setattr("lm.launch.probing.reference.SLICE_BYTES", 8 * WORDS * 5)  # 24 rows in slices of 5
    reference, plain = Reference(small_model(kind, tied)), small_model(kind, tied).double().train()
    torch.manual_seed(3)
    hidden = plain.init_hidden(4)
    for start, batch in zip((0, 6), reference.batches(text(), (0, 6), 6), strict=True):
        seen: list[Tensor] = []
        random = torch.get_rng_state()
        assert bits(states(batch.hidden)) == bits(states(hidden))
        reference.run(batch, lambda name, part, seen=seen: seen.append(part.clone()))
        torch.set_rng_state(random)
        tokens, targets = get_batch(text(), start, 6)
        plain.zero_grad()
        features, hidden = plain.features(tokens, batch.hidden)
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
        assert not any(state.requires_grad for state in states(reference.hidden))


def make_modes(names: Any, net: RNNModel, /, **options: Any) -> list[Mode]:
    made = [(name, MODES[name].script, MODES[name].options | options) for name in names]
    return [Mode(name, make_args(script, **told), precisions()[script], net) for name, script, told in made]


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_the_gradient_of_its_trainers_first_step(name, programs: Programs) -> None:
    """To the bit: all that the trainer ran before it is its own code, from its command line on."""
    trained: dict[str, Tensor] = {}
    start: list[Tensor] = []

    def look(model: RNNModel) -> None:
        start.append(torch.get_rng_state())
        for key, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, key=key: trained.update({key: p.grad.clone()}))

    programs.before_training(look)
    script, *flags = TRAINERS[name]
    run = programs.train(script, *flags, "--max-steps", "1")
    sizes = {"data": "corpus", "emsize": 8, "nhid": 8, "batch_size": 4, "bptt": 5}
    corpus = Corpus("corpus")
    torch.manual_seed(make_args("main", **sizes).seed)
    model = make_model(make_args("main", **sizes), corpus.vocab_size)
    (mode,) = make_modes([name], model, **sizes)
    torch.set_rng_state(start[0])
    state = tuple(h.double() for h in model.init_hidden(4))
    found = mode.gradients(Batch(*get_batch(batchify(corpus.train, 4, "cpu"), 0, 5), state))
    assert found.parameters.keys() == trained.keys() == dict(model.named_parameters()).keys()
    for key, gradient in found.parameters.items():
        assert gradient.dtype == trained[key].dtype
        assert bits([gradient]) == bits([trained[key]]), key
    assert found.boundaries.keys() == {n for n, kind in tensor_names(model).items() if kind == "boundary"}
    assert mode.scale == run.steps[0]["loss_scale"]
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_the_logits_is_that_of_the_formula(monkeypatch, dtype, instructions) -> None:
    monkeypatch.setattr("lm.model.kernels.cpu_multiplies", lambda _: instructions)
    model, (tokens, targets) = small_model().eval(), get_batch(text(), 0, 6)
    if dtype is torch.float16:
        precision: Any = MasterWeights(model.half().parameters(), torch.optim.SGD(model.parameters(), 1.0), 128.0)
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
    assert torch.allclose(buffer.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_tensors_are_in_forward_order() -> None:
    assert list(tensor_names(small_model(nlayers=2))) == [
        "encoder.weight", "embedding",
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "layer 0",
        "rnn.weight_ih_l1", "rnn.weight_hh_l1", "rnn.bias_ih_l1", "rnn.bias_hh_l1", "layer 1",
        "decoder.weight", "decoder.bias", "logits",
    ]  # fmt: skip
    names = list(tensor_names(small_model("Transformer", nlayers=12)))
    assert names.index("layer 1") < names.index("rnn.layers.2.linear1.weight") < names.index("layer 2")
    assert names.index("layer 10") < names.index("rnn.layers.11.norm2.bias") < names.index("layer 11")
    assert names[-1] == LOGITS


def measure(corpus, names, batches=4, prepare=lambda model: None, scaled=True, **options: Any) -> dict[str, Any]:
    sizes = {"data": str(corpus), "emsize": 16, "nhid": 16, "batch_size": 4, "bptt": 5} | options
    words = Corpus(corpus)
    torch.manual_seed(2)
    model = make_model(
        make_args("main", **{k: v for k, v in sizes.items() if k != "static_loss_scale"}), words.vocab_size
    )
    prepare(model)
    modes = make_modes(names, model, **sizes)
    half = plan_scales(modes, lambda k: make_modes(["manual"], model, **sizes | {"static_loss_scale": k})[0])
    reference = Reference(model)
    measured = Measurement(reference, Plan(modes, batches, 1, half if scaled else {}, 2.0, 0.25))
    measured.run(reference.batches(batchify(words.train, 4, "cpu"), range(0, 5 * batches, 5), 5))
    return measured.figures()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_fp32_is_next_to_float64(corpus, kind, tied) -> None:
    """So dropout masks, hidden states, batches and losses are the same: any other mask would make errors of size 1."""
    found = measure(corpus, ["fp32", "amp-fp32", "fp16-optimizer-fp32"], 3, scaled=False, model=kind, tied=tied)
    for mode in found["modes"].values():
        assert 0 < mode["total"]["error_to_noise"] < 1e-5
        assert mode["total"]["flushed"] == mode["total"]["overflowed"] == 0
    if kind == "Transformer":  # a key's bias has the gradient 0, which is not flushed
        shares = found["scales"]["predicted"]["rnn.layers.0.self_attn.in_proj_bias"]["flushed"]
        assert max(shares[-8:]) == 0


def test_half_is_near_bf16_further_off_and_what_is_predicted_is_measured(corpus) -> None:
    """Flushing on the way back is small here, so the shares of fp16 gradients are those of the reference's."""
    found = measure(corpus, PROBED, 8)
    ratio = {name: mode["total"]["error_to_noise"] for name, mode in found["modes"].items()}
    assert ratio["fp32"] < 1e-5 < 1e-4 < ratio["manual"] < 1e-2
    assert 3 < ratio["amp-bf16"] / ratio["amp-fp16"] < 20
    scales = found["scales"]
    assert [(one["mode"], one["k"]) for one in scales["measured"]] == [
        ("manual", 0), ("manual", 7), ("fp16-optimizer-dynamic", 16),
    ]  # fmt: skip
    for one in scales["measured"]:
        for name, shares in one["tensors"].items():
            for share, measured in shares.items():
                predicted = scales["predicted"][name][share][one["k"] - scales["k"][0]]
                assert measured == pytest.approx(predicted, abs=0.02), (one["k"], name, share)
    assert scales["measured"][0]["tensors"]["rnn.weight_hh_l0"]["subnormal"] > 0.1


def test_without_a_loss_scale_the_gradient_is_biased(corpus) -> None:
    """The mean over batches flushes less of a small corpus than of WikiText-2; small weights make up for that."""

    def figures(scale: float) -> dict[str, float]:
        def shrink(model: RNNModel) -> None:
            model.decoder.weight.data.mul_(2.0**-14)

        found = measure(corpus, ["manual"], 6, shrink, scaled=False, static_loss_scale=scale)
        return found["modes"]["manual"]["tensors"]["encoder.weight"]

    plain, scaled = figures(1.0), figures(128.0)
    assert plain["bias"] > 2 * plain["bias_error"]
    assert plain["bias"] > 5 * scaled["bias"]
    assert plain["flushed"] > 5 * scaled["flushed"]
    assert 0.5 * plain["bias"] < plain["bias_flushed"] < 1.5 * plain["bias"]


def test_a_model_that_is_probed_is_left_alone(corpus) -> None:
    models: list[tuple[RNNModel, list[bytes]]] = []

    def content(model: RNNModel) -> list[bytes]:
        return bits([*model.state_dict().values(), *(p.grad for p in model.parameters())])

    def prepare(model: RNNModel) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        models.append((model, content(model)))

    measure(corpus, MODES, 3, prepare)
    ((model, before),) = models
    assert content(model) == before
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
