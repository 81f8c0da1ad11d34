"""probe.py from its command line to its files, and what it measures of a small LSTM."""

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from lm.launch.probing.measure import Plan, Probe, plan_scales

from jobs import bits, mostly_slow
from lm.data.corpus import Corpus, batchify, get_batch
from lm.launch.probing.mode import PROBED, Mode
from lm.model.language_model import KINDS, detach, make_model
from lm.model.model_file import load_model, save_model
from lm.options.config import make_args
from lm.options.modes import MODES
from programs import PROBE, SMALL, Programs
from roundoff.gradients.result import read_probe

FILES = {"probe.html", "probe.json", "probe.png"}


def probe(programs: Programs, *flags: str, trainer: Sequence[str] = SMALL) -> dict:
    done = programs.run("probe", *PROBE, *flags, *(("--", *trainer) if trainer else ()))
    assert (done.code, done.err) == (0, ""), done
    assert {path.name for path in (programs.folder / "probe").iterdir()} == FILES
    return read_probe(programs.folder / "probe" / "probe.json")


def measure(corpus, names, batches=4, flags=(), kind="LSTM", **sizes) -> dict:
    flags = ["--data", str(corpus), *flags]
    args = make_args("main", data=str(corpus), model=kind, emsize=16, nhid=16, batch_size=4, bptt=5, **sizes)
    torch.manual_seed(2)
    text = Corpus(corpus)
    model = make_model(args, text.vocab_size)
    modes = [Mode(name, flags) for name in names]
    measured = Probe(model, Plan(modes, plan_scales(modes, flags), batches, 5, 1, 2.0, 0.25))
    measured.run(batchify(text.train, 4, "cpu"))
    return measured.figures()


def test_all_of_it(programs):
    result = probe(programs)
    assert list(result["modes"]) == list(PROBED)
    assert result["weights"] == {"kind": "fresh", "path": None, "epoch": None, "steps": None}
    assert (result["batches"], result["batch_size"], result["bptt"], result["lr"]) == (4, 4, 5, 20.0)
    assert (result["corpus"]["name"], result["data"], result["model"]["nhid"]) == ("corpus", "corpus", 8)
    scales = {name: mode["loss_scale"] for name, mode in result["modes"].items()}
    assert scales == {
        "fp32": 1, "manual": 128, "fp16-optimizer-dynamic": 65536, "amp-fp16": 65536, "amp-bf16": 1,
    }  # fmt: skip
    dtypes = {name: (mode["weights"], mode["dtype"]) for name, mode in result["modes"].items()}
    assert dtypes["manual"] == ("float16", "float16")
    assert dtypes["amp-fp16"] == dtypes["amp-bf16"] == dtypes["fp32"] == ("float32", "float32")
    assert [(one["mode"], one["k"]) for one in result["scales"]["measured"]] == [
        ("manual", 0), ("manual", 7), ("fp16-optimizer-dynamic", 16),
    ]  # fmt: skip
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 1e7


def test_a_run_that_was_started_with_use_optimizer(programs):
    programs.train("main", "--use-optimizer")
    assert programs.run("probe", *PROBE[2:], "--modes", "fp32", "--run", "run").code == 0
    assert read_probe(programs.folder / "probe" / "probe.json")["lr"] == 0.001


def test_the_same_again_is_the_same(programs):
    results = []
    for _ in range(2):
        result = probe(programs)
        results.append({name: result[name] for name in result if name not in ("seconds", "peak_memory_bytes")})
        for name in FILES:
            (programs.folder / "probe" / name).unlink()
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_fp32_is_next_to_float64(corpus, kind, tied):
    """So dropout masks, hidden states, batches and losses are the same: any other mask would make errors of size 1."""
    modes = measure(corpus, ["fp32", "amp-fp32", "fp16-optimizer-fp32"], kind=kind, tied=tied)["modes"]
    for mode in modes.values():
        assert 0 < mode["total"]["error_to_noise"] < 1e-5
        assert mode["total"]["flushed"] == mode["total"]["overflowed"] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_figures_are_those_of_a_plain_loop(corpus, tied):
    """Dense float64 gradients of three batches, one after the other, and a mode's beside them."""
    flags = ["--data", str(corpus), "--dropout", "0.3"]
    args = make_args("main", data=str(corpus), emsize=16, nhid=16, batch_size=4, bptt=5, dropout=0.3, tied=tied)
    torch.manual_seed(2)
    text = Corpus(corpus)
    model = make_model(args, text.vocab_size)
    data = batchify(text.train, 4, "cpu")
    mode = Mode("manual", flags)
    measured = Probe(model, Plan([mode], {}, 3, 5, 11, 2.0, 0.25))
    measured.run(data)
    figures = measured.figures()

    plain = copy.deepcopy(model).double().train()
    hidden = plain.init_hidden(4)
    truth, errors, updates = [], [], []
    torch.manual_seed(11)
    for start in (0, 5, 10):
        tokens, targets = get_batch(data, start, 5)
        random = torch.get_rng_state()
        found = mode.gradients(model, tokens, targets, hidden).parameters
        torch.set_rng_state(random)
        plain.zero_grad()
        features, hidden_after = plain.features(tokens, hidden)
        loss = F.cross_entropy(F.linear(features, plain.decoder.weight, plain.decoder.bias).flatten(0, 1), targets)
        loss.backward()
        hidden = detach(hidden_after)
        truth.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
        errors.append(torch.cat([g.double().flatten() / 128 for g in found.values()]) - truth[-1])
        updates.append(truth[-1] * 2.0 * min(1.0, 0.25 / (float(truth[-1].norm()) + 1e-6)))
    truth, errors = torch.stack(truth), torch.stack(errors)
    noise = float(truth.var(0).sum().sqrt())
    assert figures["total"]["noise"] == pytest.approx(noise, rel=1e-6)
    assert figures["total"]["gradient"] == pytest.approx(float(truth.mean(0).norm()), rel=1e-6)
    total = figures["modes"]["manual"]["total"]
    assert total["error_to_noise"] == pytest.approx(float(errors.square().sum(1).mean().sqrt()) / noise, rel=1e-6)
    square = float(errors.sum(0).square().sum() - errors.square().sum()) / 6
    assert total["bias"] == pytest.approx(max(0.0, square) ** 0.5 / float(truth.mean(0).norm()), rel=1e-4)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).half()
    units = weights.abs().nextafter(torch.tensor(torch.inf, dtype=torch.half)).double() - weights.abs().double()
    moved = torch.stack(updates)
    stagnated = int(((moved.abs() < units / 2) & (moved != 0)).sum()) / int(moved.count_nonzero())
    assert total["stagnated"] == pytest.approx(stagnated, rel=1e-6)


def test_half_is_near_and_bf16_further_off(corpus):
    modes = measure(corpus, PROBED)["modes"]
    ratio = {name: mode["total"]["error_to_noise"] for name, mode in modes.items()}
    assert ratio["fp32"] < 1e-5 < 1e-4 < ratio["manual"] < 1e-2
    assert 3 < ratio["amp-bf16"] / ratio["amp-fp16"] < 20


def test_without_a_loss_scale_the_gradient_is_biased(corpus):
    """The mean over batches flushes less of a small corpus than of WikiText-2; small weights make up for that."""

    def total(scale):
        flags = ["--static-loss-scale", str(scale)]
        args = make_args("main", data=str(corpus), emsize=16, nhid=16, batch_size=4, bptt=5)
        torch.manual_seed(2)
        text = Corpus(corpus)
        model = make_model(args, text.vocab_size)
        with torch.no_grad():
            model.decoder.weight.mul_(2.0**-14)
        modes = [Mode("manual", ["--data", str(corpus), *flags])]
        measured = Probe(model, Plan(modes, {}, 6, 5, 1, 2.0, 0.25))
        measured.run(batchify(text.train, 4, "cpu"))
        figures = measured.figures()["modes"]["manual"]["tensors"]["encoder.weight"]
        assert figures["bias"] > 2 * figures["bias_error"] or scale > 1
        return figures

    plain, scaled = total(1), total(128)
    assert plain["bias"] > 5 * scaled["bias"]
    assert plain["flushed"] > 5 * scaled["flushed"]
    assert 0.5 * plain["bias"] < plain["bias_flushed"] < 1.5 * plain["bias"]


def test_what_is_predicted_is_measured(corpus):
    """Flushing on the way back is small here, so the shares of fp16 gradients are those of the reference's."""
    scales = measure(corpus, ["manual"], batches=8)["scales"]
    for one in scales["measured"]:
        for name, shares in one["tensors"].items():
            for share, found in shares.items():
                predicted = scales["predicted"][name][share][one["k"] - scales["k"][0]]
                assert found == pytest.approx(predicted, abs=0.02), (one["k"], name, share)
    assert scales["measured"][0]["tensors"]["rnn.weight_hh_l0"]["subnormal"] > 0.1


def test_a_model_that_is_probed_is_left_alone(corpus):
    args = make_args("main", data=str(corpus), emsize=8, nhid=8)
    text = Corpus(corpus)
    model = make_model(args, text.vocab_size)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    gradients, random = bits([p.grad for p in model.parameters()]), torch.get_rng_state()
    modes = [Mode(name, ["--data", str(corpus)]) for name in MODES]
    measured = Probe(model, Plan(modes, plan_scales(modes, []), 3, 5, 1, 2.0, 0.25))
    measured.run(batchify(text.train, 4, "cpu"))
    measured.figures()
    assert bits(list(model.state_dict().values())) == bits(list(before.values()))
    assert bits([p.grad for p in model.parameters()]) == gradients
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("script", mostly_slow(["main", "main_fp16_optimizer", "main_amp"], "main_fp16_optimizer"))
def test_a_run_gives_its_fp32_weights_and_flags(programs, script):
    half = [] if script == "main_amp" else ["--fp16"]
    programs.train(script, *half, "--lr", "3", "--seed", "7", "--static-loss-scale", "2")
    before = programs.files()
    result = probe(programs, "--run", "run", trainer=())
    assert result["weights"] == {"kind": "run", "path": "run", "epoch": 3, "steps": 36}
    assert (result["seed"], result["batch_size"], result["bptt"], result["model"]["emsize"]) == (7, 4, 5, 8)
    assert result["lr"] in (3.0, 0.75)
    assert result["modes"]["manual"]["loss_scale"] == 2
    changed = {name: content for name, content in programs.files().items() if not name.startswith("probe")}
    assert changed == before
    model, _ = load_model(programs.folder / "model.safetensors")
    assert model.options == result["model"]


@pytest.mark.parametrize(("kind", "lr"), [("LSTM", 20.0), ("Transformer", 5.0)])
def test_a_model_file(saved, kind, lr):
    text = Corpus("corpus")
    args = make_args("main", data="corpus", model=kind, emsize=8, nhid=8)
    save_model(saved.folder / "model.safetensors", make_model(args, text.vocab_size).half(), text.dictionary.idx2word)
    result = probe(saved, "--checkpoint", "model.safetensors", trainer=("--bptt", "6", "--batch_size", "3"))
    assert result["weights"]["kind"] == "checkpoint"
    assert (result["bptt"], result["batch_size"], result["model"]["nhid"]) == (6, 3, 8)
    assert (result["model"]["kind"], result["lr"]) == (kind, lr)


def test_attention_does_not_see_the_bias_of_its_keys(corpus):
    """A gradient of 0 that is not flushed: without care, float64's rounding would have every loss scale refused."""
    scales = measure(corpus, ["fp32"], kind="Transformer", batches=3)["scales"]
    assert max(scales["predicted"]["rnn.layers.0.self_attn.in_proj_bias"]["flushed"][-8:]) == 0
