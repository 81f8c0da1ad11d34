"""What apex_compat.amp saves and loads: a resumed run equals the undisturbed one in every bit, at every level."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_cases import (  # noqa: F401
    INF,
    OPTIMIZERS,
    Net,
    amp,
    backward,
    equal_states,
    images,
    initialize,
    mlp,
    through_a_file,
    torch_as_it_was,
)
from fp16_cases import masters_of, same, snapshot

LEVELS = ["O0", "O1", "O2", "O3"]
each_level = pytest.mark.parametrize("level", LEVELS)
STEPS, SAVED_BEFORE, SPOILED = 6, 3, {1, 4}
SCALE = {"O0": "dynamic", "O3": "dynamic"}


def adam(params):
    return torch.optim.Adam(params, lr=0.01, eps=1e-4)  # in half 1e-8 is 0


MAKERS = {"sgd": OPTIMIZERS["sgd"], "adam": adam}


def build(level, optimizer, device="cpu"):
    network = Net().to(device)
    return initialize(network, optimizer(network.parameters()), opt_level=level, loss_scale=SCALE.get(level))


def step(network, optimizer, i, device="cpu"):
    x, y = images(i, device)
    optimizer.zero_grad()
    loss = F.cross_entropy(network(x), y) * (INF if i in SPOILED else 1.0)
    backward(loss, optimizer)
    nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
    optimizer.step()


def saved(network, optimizer):
    return through_a_file({"model": network.state_dict(), "optimizer": optimizer.state_dict(), "amp": amp.state_dict()})


def everything(network, optimizer):
    tensors = [t.detach() for t in (*network.parameters(), *network.buffers())]
    return snapshot(tensors, masters_of(optimizer), list(optimizer.state.values()), list(amp.state_dict().values()))


@each_level
@pytest.mark.parametrize("optimizer", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("moment", ["before the first step", "after a step", "optimizer first"])
def test_a_resumed_run_is_the_undisturbed_one(level, optimizer, moment, device):
    network, wrapped = build(level, optimizer, device)
    for i in range(STEPS):
        if i == SAVED_BEFORE:
            checkpoint = saved(network, wrapped)
        step(network, wrapped, i, device)
    expected = everything(network, wrapped)
    assert amp._amp_state.loss_scalers[0].loss_scale() == 2.0**16 / 2 ** len(SPOILED)  # all others were applied
    network, wrapped = build(level, optimizer, device)
    if moment == "after a step":
        step(network, wrapped, 10, device)
    parts = {"model": network, "optimizer": wrapped, "amp": amp}
    for name in ("optimizer", "amp", "model") if moment == "optimizer first" else ("model", "optimizer", "amp"):
        parts[name].load_state_dict(checkpoint[name])
    for i in range(SAVED_BEFORE, STEPS):
        step(network, wrapped, i, device)
    assert same(expected, everything(network, wrapped))


class Tied(nn.Module):
    """Ties two layers, freezes a third, and has a BatchNorm without weights, whose statistics are in half."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.rows, self.frozen, self.out = nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.out.weight = self.rows.weight
        self.frozen.requires_grad_(False)

    def forward(self, y):
        return self.out(self.norm(self.frozen(self.rows(y))))


def build_tied(level):
    network = Tied()
    groups = [
        {"params": [network.rows.weight]},
        {"params": [*network.frozen.parameters(), network.out.bias], "lr": 0.1},
    ]
    return initialize(network, adam(groups), opt_level=level, loss_scale=128.0)


def steps_of_tied(network, optimizer, numbers):
    for i in numbers:
        optimizer.zero_grad()
        _, y = images(i)
        backward(F.cross_entropy(network(y), 2 - y), optimizer)
        optimizer.step()


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_tied_frozen_and_grouped_weights_resume(level):
    network, optimizer = build_tied(level)
    steps_of_tied(network, optimizer, range(3))
    checkpoint = saved(network, optimizer)
    steps_of_tied(network, optimizer, range(3, 6))
    expected = everything(network, optimizer)
    assert torch.equal(checkpoint["model"]["rows.weight"], checkpoint["model"]["out.weight"])
    assert not torch.equal(network.rows.weight.float(), checkpoint["model"]["rows.weight"])
    network, optimizer = build_tied(level)
    network.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    amp.load_state_dict(checkpoint["amp"])
    steps_of_tied(network, optimizer, range(3, 6))
    assert same(expected, everything(network, optimizer))


@each_level
def test_a_saved_model_is_fp32_and_gives_the_same_model(level):
    network, optimizer = build(level, adam)
    for i in (0, 2):
        step(network, optimizer, i)
    state = through_a_file(network.state_dict())
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    assert list(state) == list(Net().state_dict())
    before = copy.deepcopy([*network.parameters(), *network.buffers()])
    network.load_state_dict(state)
    assert same([t.detach() for t in before], [t.detach() for t in (*network.parameters(), *network.buffers())])
    if level == "O2":
        weights = [state[name] for name, _ in network.named_parameters()]
        assert {id(m) for m in masters_of(optimizer)}.isdisjoint({id(p) for p in network.conv.parameters()})
        by_name = dict(zip([name for name, _ in network.named_parameters()], masters_of(optimizer), strict=True))
        assert same(weights, [by_name[name].detach() for name, _ in network.named_parameters()])


def test_a_saved_part_of_a_model_has_masters_too():
    network, optimizer = build("O2", adam)
    step(network, optimizer, 0)
    whole, part = network.state_dict(), network.layers.state_dict()
    assert same(list(part.values()), [whole[f"layers.{name}"] for name in part])


def test_a_checkpoint_without_masters_loads():
    """An old file of apex's O2 holds half weights as fp32."""
    network, optimizer = build("O2", adam)
    for i in (0, 2):
        step(network, optimizer, i)
    old = {k: v.half().float() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network, optimizer = build("O2", adam)
    step(network, optimizer, 0)
    network.load_state_dict(through_a_file(old))
    assert same(
        [p.detach().float() for p in network.layers.parameters()],
        [old[f"layers.{name}"].half().float() for name, _ in network.layers.named_parameters()],
    )
    step(network, optimizer, 2)  # it goes on from what was loaded
    moved = (network.layers[0].weight.float() - old["layers.0.weight"]).abs().max().item()
    assert 0 < moved < 0.05


@each_level
def test_an_optimizer_loaded_before_the_first_step_keeps_small_numbers(level):
    network, optimizer = build(level, OPTIMIZERS["adam"])
    if level == "O3":
        pytest.skip("O3 keeps Adam's state in half by definition")
    step(network, optimizer, 0)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["exp_avg_sq"].fill_(1.2e-12)
    network, optimizer = build(level, OPTIMIZERS["adam"])
    optimizer.load_state_dict(through_a_file(state))
    found = {t for entry in optimizer.state_dict()["state"].values() for t in entry["exp_avg_sq"].unique().tolist()}
    assert found == {torch.tensor(1.2e-12).item()}


@each_level
def test_state_of_before_initialize_goes_on(level):
    """Scripts load the optimizer first, then initialize."""
    network = mlp()
    plain = OPTIMIZERS["sgd"](network.parameters())
    x = torch.randn(3, 4)
    network(x).sum().backward()
    plain.step()
    buffers = [entry["momentum_buffer"].clone() for entry in plain.state.values()]
    network, optimizer = initialize(network, plain, opt_level=level)
    optimizer.zero_grad()
    backward(network(x).float().sum(), optimizer)
    found = [optimizer.state[p]["momentum_buffer"] for p in amp.master_params(optimizer)]
    assert {t.dtype for t in found} == {torch.float16 if level == "O3" else torch.float32}
    assert len(found) == len(buffers)
    assert all(torch.allclose(a.float(), b, rtol=1e-3, atol=1e-4) for a, b in zip(found, buffers, strict=True))
    optimizer.step()


def scalers(num_losses=2, **kwargs):
    network = mlp()
    return initialize(network, OPTIMIZERS["sgd"](network.parameters()), num_losses=num_losses, **kwargs)


def test_amp_state_has_apexs_layout():
    scalers()
    amp._amp_state.loss_scalers[1]._loss_scale = 2.0**20
    amp._amp_state.loss_scalers[1]._unskipped = 7
    state = amp.state_dict()
    assert list(state.items()) == [
        ("loss_scaler0", {"loss_scale": 2.0**16, "unskipped": 0}),
        ("loss_scaler1", {"loss_scale": 2.0**20, "unskipped": 7}),
    ]
    assert [type(v) for v in state["loss_scaler1"].values()] == [float, int]
    destination = {"mine": 1}
    assert amp.state_dict(destination) is destination
    assert list(destination) == ["mine", "loss_scaler0", "loss_scaler1"]
    scalers()
    amp.load_state_dict(through_a_file(state))
    assert [(s.loss_scale(), s._unskipped) for s in amp._amp_state.loss_scalers] == [(2.0**16, 0), (2.0**20, 7)]


def entries(*scales):
    return {f"loss_scaler{i}": {"loss_scale": scale, "unskipped": i} for i, scale in enumerate(scales)}


def test_a_state_of_another_length(capsys):
    scalers()
    amp.load_state_dict(entries(2.0, 4.0, 8.0, 16.0))
    assert capsys.readouterr().out.splitlines() == [
        "Warning: state_dict contains 4 entries, while 2 loss_scalers are used",
        "Skipping loss_scaler[2], since num_losses was set to 2",
    ]
    assert [s.loss_scale() for s in amp._amp_state.loss_scalers] == [2.0, 4.0]
    amp.load_state_dict(entries(32.0))
    assert capsys.readouterr().out == "Warning: state_dict contains 1 entries, while 2 loss_scalers are used\n"
    assert [s.loss_scale() for s in amp._amp_state.loss_scalers] == [32.0, 4.0]


def test_a_state_with_unknown_keys_loads_the_good_ones_and_raises():
    scalers()
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict. Unexpected key\(s\).*other"):
        amp.load_state_dict({"other": 1, **entries(2.0)})
    assert amp._amp_state.loss_scalers[0].loss_scale() == 2.0


@each_level
def test_copies_and_pickles_are_networks_of_their_own(level):
    network, optimizer = build(level, adam)
    step(network, optimizer, 0)
    x, _ = images(0)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301  our own bytes
        assert equal_states(network, made)
        made.eval()
        with torch.no_grad():
            for param in made.parameters():
                param.zero_()
            for call in (made, made.forward):
                assert call(x).abs().sum() == 0
                assert call(x).dtype == (torch.float16 if level == "O1" else torch.float32)
    assert network.eval()(x).abs().sum() > 0
