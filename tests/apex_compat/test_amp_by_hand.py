"""Each opt level of apex_compat.amp equals, in every bit, the same training written out in plain PyTorch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_cases import (  # noqa: F401
    COPIES,
    INF,
    OPTIMIZERS,
    ByHand,
    Casts,
    Net,
    Residual,
    amp,
    backward,
    equal_states,
    half_copy,
    images,
    initialize,
    rows,
    torch_as_it_was,
)
from fp16_cases import masters_of, same

STEPS, SPOILED = 4, 1
"""Where the scale is dynamic, the loss of one step is inf."""
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def train(level, network, hand, batch, device, forward=None, scale=None):
    """Train a network under amp and the other by hand; assert that they are equal after each step."""
    optimizer = hand[1]
    network = network.to(device)
    hand = hand[0].to(device)
    given = optimizer(network.parameters())
    network, wrapped = initialize(network, given, opt_level=level, loss_scale=scale, verbosity=1)
    masters = level == "O2"
    with amp.disable_casts():
        by_hand = ByHand(hand, optimizer, wrapped_scale(level, scale), masters)
    for i in range(STEPS):
        x, y = batch(i, device)
        factor = INF if wrapped_scale(level, scale) == "dynamic" and i == SPOILED else 1.0
        wrapped.zero_grad()
        backward(F.cross_entropy(first(network(x)), y) * factor, wrapped)
        wrapped.step()
        with amp.disable_casts():
            out = forward(hand, x)
            by_hand.step(F.cross_entropy(out.float(), y) * factor)
        assert equal_states(network, hand), i
    assert amp._amp_state.loss_scalers[0].loss_scale() == by_hand.scale
    masters = [p.detach() for p in by_hand.masters]
    assert same([p.detach() for p in amp.master_params(wrapped)], masters)
    return wrapped


def wrapped_scale(level, scale):
    """Return the loss scale of a level, or what overrides it."""
    return scale or {"O0": 1.0, "O1": "dynamic", "O2": "dynamic", "O3": 1.0}[level]


def first(value):
    return value[0] if isinstance(value, tuple) else value


@each_optimizer
@pytest.mark.parametrize("scale", [1.0, 128.0, "dynamic"])
def test_o2_is_a_loop_with_masters(optimizer, scale, device, capsys):
    hand = half_copy(Net(), keep_batchnorm=True)
    wrapped = train("O2", Net(), (hand, optimizer), images, device, lambda net, x: net(x.half()), scale)
    assert all(master.dtype == torch.float32 for master in masters_of(wrapped))
    assert ("Gradient overflow." in capsys.readouterr().out) == (scale == "dynamic")


@each_optimizer
@pytest.mark.parametrize("scale", [None, 128.0])
def test_o3_is_a_loop_in_half(optimizer, scale, device):
    hand = half_copy(Net(), keep_batchnorm=False)
    if optimizer is OPTIMIZERS["adam"]:  # in half 1e-8 is 0, and a gradient of 0 gives 0 / 0

        def optimizer(params):
            return torch.optim.Adam(params, lr=0.01, eps=1e-4)

    train("O3", Net(), (hand, optimizer), images, device, lambda net, x: net(x.half()), scale)


@each_optimizer
@pytest.mark.parametrize("scale", [None, 128.0, "dynamic"])
def test_o0_is_a_loop_in_fp32(optimizer, scale, device):
    train("O0", Net(), (Net(), optimizer), images, device, lambda net, x: net(x), scale)


@pytest.mark.parametrize("scale", [None, 128.0])
@pytest.mark.parametrize("case", COPIES.values(), ids=list(COPIES))
def test_o1_is_a_copy_with_casts_by_hand(case, scale, device):
    train("O1", case.network(), (case.network(), OPTIMIZERS["sgd"]), case.batch, device, case.by_hand, scale)


def test_o1_is_a_copy_with_casts_by_hand_under_adam(device):
    case = COPIES["residual"]
    train("O1", case.network(), (case.network(), OPTIMIZERS["adam"]), case.batch, device, case.by_hand)


def test_a_network_without_amp_is_another(device):
    """The copies differ from plain fp32 training, so that the comparisons above say something."""
    for case in COPIES.values():
        network = case.network().to(device)
        x, _ = case.batch(0, device)
        assert not torch.equal(first(network(x)).float(), case.by_hand(network, x).float())


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_bfloat16_masters(level):
    """O2 and O3 take bfloat16 as apex did; O1 takes it as an extension."""
    if level == "O0":
        pytest.skip("O0 is fp32 by definition")
    network = Residual()
    network, optimizer = initialize(
        network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, cast_model_type=torch.bfloat16
    )
    seen = []
    network.first.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for i in range(2):
        x, y = rows(i)
        optimizer.zero_grad()
        backward(F.cross_entropy(network(x), y), optimizer)
        optimizer.step()
    assert set(seen) == {torch.bfloat16}
    expected = torch.bfloat16 if level == "O3" else torch.float32
    assert {p.dtype for p in amp.master_params(optimizer)} == {expected}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_accumulated_gradients_are_sums(level, device):
    """With delay_unscale and without, four passes leave the sum of their gradients."""
    network = Net().to(device)
    network, optimizer = initialize(
        network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, loss_scale=2.0**10
    )
    found = []
    for delay in (False, True):
        optimizer.zero_grad()
        for i in range(4):
            x, y = images(i, device)
            backward(F.cross_entropy(network(x), y), optimizer, delay_unscale=delay and i < 3)
        found.append([p.grad.float() for p in amp.master_params(optimizer)])
    plain = Net().to(device)
    with amp.disable_casts():
        sum(F.cross_entropy(plain(x), y) for x, y in (images(i, device) for i in range(4))).backward()
    for a, b, expected in zip(*found, [p.grad for p in plain.parameters()], strict=True):
        assert torch.allclose(a, b, rtol=0.01, atol=2e-3)
        assert torch.allclose(a, expected, rtol=0.05, atol=0.02)


def test_masters_sum_micro_batches_in_fp32(device):
    network = nn.Linear(1, 1, bias=False).to(device)
    network, optimizer = initialize(
        network, torch.optim.SGD(network.parameters(), lr=1.0), opt_level="O2", loss_scale=1024.0
    )
    gradients = [1.0, 2.0**-12, 2.0**-12]
    for value in gradients:
        backward(network(torch.full((1, 1), value, device=device)).sum(), optimizer)
    (master,) = amp.master_params(optimizer)
    assert master.grad.item() == sum(gradients)


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_gradients_are_true_between_exit_and_step(level):
    network, plain = Net(), Net()
    x, y = images(0)
    F.cross_entropy(plain(x), y).backward()
    network, optimizer = initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, loss_scale=256.0)
    backward(F.cross_entropy(network(x), y), optimizer)
    norm = torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1e9)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    assert torch.allclose(norm.float(), expected, rtol=0.02)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_two_losses_one_network_and_two_optimizers(level, device):
    """Two networks, a loss for each, one scaler a loss; each follows its own loop by hand."""
    networks = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(device) for _ in range(2)]
    copies = [copy.deepcopy(n) for n in networks]
    if level == "O2":
        copies = [c.half() for c in copies]
    networks, optimizers = initialize(
        networks, [OPTIMIZERS["sgd"](n.parameters()) for n in networks], opt_level=level, num_losses=2
    )
    hands = [ByHand(c, OPTIMIZERS["sgd"], "dynamic", level == "O2") for c in copies]
    for i in range(3):
        for k in range(2):
            x, y = rows(2 * i + k, device)
            factor = INF if i == k else 1.0
            optimizers[k].zero_grad()
            backward(F.cross_entropy(networks[k](x), y) * factor, optimizers[k], loss_id=k)
            optimizers[k].step()
            with amp.disable_casts():
                hands[k].step(F.cross_entropy(by_hand(copies[k], x).float(), y) * factor)
            assert equal_states(networks[k], copies[k])
    assert [s.loss_scale() for s in amp._amp_state.loss_scalers] == [hand.scale for hand in hands]


def by_hand(network, x):
    casts = Casts()
    first_layer, _, last = network
    hidden = F.relu(F.linear(x.half(), *casts(first_layer.weight, first_layer.bias)))
    return F.linear(hidden, *casts(last.weight, last.bias))
