"""What FP16_Optimizer promises for every dtype, group and wrapped optimizer: CASES x BEHAVIOURS."""

import io

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from fp16_cases import CASES, INF, VARIANTS, ByHand, halves_of, loss_of, masters_of, problem, same, snapshot

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
every_case = pytest.mark.parametrize("case", [*CASES.values(), *VARIANTS.values()], ids=[*CASES, *VARIANTS])

STATIC = {"static_loss_scale": 2.0**11}
DYNAMIC = {
    "dynamic_loss_scale": True,
    "dynamic_loss_args": {"init_scale": 2.0**11, "scale_window": 2, "max_loss_scale": 2.0**12},
}
SPOILED = {0, 1, 6}
STEPS = 8
SAVED_BEFORE = (0, 1, 3, 7)

WAYS = [  # the scale, how gradients are made, max_norm and norm_type, parts of a batch
    (STATIC, "at once", (0.05, INF), 1),
    (DYNAMIC, "at once", (1e9, 2), 2),
    (STATIC, "deferred", (0.05, 1.0), 2),
    (DYNAMIC, "loss.backward()", None, 1),
]


def step(network, optimizer, i, clip=None, parts=1, way="at once", factor=1.0):
    """Take one step; return the norm that clipping reports, if it clips."""
    (network if way == "deferred" else optimizer).zero_grad()
    for x, y in halves_of(i, parts):
        loss = loss_of(network, x, y) * factor
        if way == "loss.backward()":
            (loss * optimizer.loss_scale).backward()
        else:
            optimizer.backward(loss, update_master_grads=way == "at once")
    if way != "at once":
        optimizer.update_master_grads()
    norm = optimizer.clip_master_grads(*clip) if clip else None
    optimizer.step()
    return norm


@every_case
def test_training_is_the_loop_by_hand(case):
    for scale, way, clip, parts in WAYS:
        clip = None if "norm" in case.limits else clip
        parts = 1 if "sums" in case.limits else parts
        network, optimizer = case.build(**scale)
        # The loop runs at another power of two: where nothing is subnormal, no bit depends on it.
        narrow = torch.float16 in {param.dtype for param in network.parameters()}
        hand = ByHand(case, scale=2.0**10 if narrow else 2.0**-8)
        for i in range(3):
            assert step(network, optimizer, i, clip, parts, way) == hand.step(i, clip, parts)
        assert same(snapshot(network, optimizer), snapshot(hand.network, hand.optimizer)), (way, clip, parts)
        for param, master in zip(network.parameters(), masters_of(optimizer), strict=True):
            assert torch.equal(param, master.to(param.dtype))
            assert master.dtype == torch.float32


@every_case
@pytest.mark.parametrize(("first", "scale"), [(0, DYNAMIC), (2, STATIC)], ids=["the first", "a later one"])
def test_a_skipped_step_changes_nothing(case, first, scale):
    (control, twin), (network, optimizer) = case.build(**STATIC), case.build(**scale)
    for i in range(4):
        if i == first:
            for _ in range(2):
                before, scale_before = snapshot(network, masters_of(optimizer)), optimizer.loss_scale
                optimizer.zero_grad()
                optimizer.backward(loss_of(network, *problem(i)) * INF)
                assert optimizer.overflow
                assert optimizer.found_inf.item() == 1.0
                assert optimizer.clip_master_grads(1.0).item() == -1.0
                assert optimizer.inspect_master_grad_data() is None
                assert optimizer.step() is None
                assert optimizer.loss_scale == scale_before / (2.0 if optimizer.dynamic_loss_scale else 1.0)
                assert same(before, snapshot(network, masters_of(optimizer)))
        step(control, twin, i)
        step(network, optimizer, i)
        assert not optimizer.overflow
        assert optimizer.found_inf.item() == 0.0
    assert same(snapshot(control, twin), snapshot(network, optimizer))


def through_a_file(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@each_case
def test_a_saved_state_resumes_to_the_last_bit(case):
    def build():
        network, optimizer = case.build(**DYNAMIC)
        return network, optimizer, StepLR(optimizer, 2, gamma=0.9)

    def run(parts, steps):
        scales = []
        for i in steps:
            step(*parts[:2], i, clip=(0.5,), factor=INF if i in SPOILED else 1.0)
            parts[2].step()
            scales.append((parts[1].loss_scale, parts[1].overflow, parts[1].found_inf.item()))
        return scales

    undisturbed, saved, scales = build(), [], []
    for i in range(STEPS):
        if i in SAVED_BEFORE:
            saved.append(through_a_file(*undisturbed))
        scales += run(undisturbed, [i])
    assert len({scale for scale, *_ in scales}) >= 3
    expected = snapshot(*undisturbed[:2])
    for start, states in zip(SAVED_BEFORE, saved, strict=True):
        resumed = build()
        resumed[0].load_state_dict(states[0])
        with torch.no_grad():
            for param in resumed[0].parameters():
                if param.dtype != torch.float32:  # the masters must win over these
                    param.add_(1.0)
        for part, state in zip(resumed[1:], states[1:], strict=True):
            part.load_state_dict(state)
        assert resumed[1].overflow == (start - 1 in SPOILED)
        assert resumed[1].found_inf.item() == float(start - 1 in SPOILED)
        assert run(resumed, range(start, STEPS)) == scales[start:]
        assert same(expected, snapshot(*resumed[:2])), start


@each_case
def test_a_closure_takes_the_same_step(case):
    (control, twin), (network, optimizer) = case.build(**STATIC), case.build(**STATIC)
    for i in range(3):

        def closure(i=i):
            optimizer.zero_grad()
            loss = loss_of(network, *problem(i))
            optimizer.backward(loss)
            return loss

        expected = loss_of(network, *problem(i)).item()
        assert optimizer.step(closure).item() == expected
        step(control, twin, i)
    assert same(snapshot(control, twin), snapshot(network, optimizer))


@each_case
@pytest.mark.parametrize("attach", ["wrapper", "wrapped"])
def test_schedulers_follow_and_do_not_warn(case, attach):
    network, optimizer = case.build(**STATIC)
    scheduler = StepLR(optimizer if attach == "wrapper" else optimizer.optimizer, 1, gamma=0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    for i in range(3):
        step(network, optimizer, i, factor=INF if i == 0 else 1.0)
        assert optimizer.overflow == (i == 0)
        scheduler.step()  # a warning of a wrong order would be an error
        assert [group["lr"] for group in optimizer.optimizer.param_groups] == [r * 0.5 ** (i + 1) for r in rates]


@each_case
def test_hooks_fire_once(case):
    network, optimizer = case.build(**STATIC)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt)))
    optimizer.optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("wrapped", opt)))
    step(network, optimizer, 0)
    assert seen == [("pre", optimizer), ("wrapped", optimizer.optimizer), ("post", optimizer)]
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen[3:] == ["saving", "loaded"]


@each_case
def test_every_way_to_zero_gradients_starts_a_fresh_sum(case):
    network, optimizer = case.build(**STATIC)
    expected = None
    for zero in (
        optimizer.zero_grad,
        lambda: optimizer.zero_grad(set_grads_to_None=True),
        lambda: optimizer.zero_grad(set_to_none=True),
        network.zero_grad,
        *([lambda: network.zero_grad(set_to_none=False)] if "sums" not in case.limits else []),
    ):
        zero()
        optimizer.backward(loss_of(network, *problem()))
        optimizer.update_master_grads()  # a second one changes nothing
        found = snapshot(optimizer.inspect_master_grad_data())
        expected = expected or found
        assert same(expected, found)


@each_case
def test_a_parameter_without_a_gradient_is_left_alone(case):
    network, optimizer = case.build(**STATIC)
    step(network, optimizer, 0)
    first, others = next(network.parameters()), list(network.parameters())[1:]
    master = masters_of(optimizer)[0]
    kept, before = snapshot(first, master, optimizer.state[master]), snapshot(others)
    network.zero_grad()  # it does not know the masters, whose gradients are still those of the first step
    optimizer.backward(loss_of(network, *problem(1)), update_master_grads=False)
    first.grad = None
    optimizer.update_master_grads()
    assert optimizer.inspect_master_grad_data()[0][0] is None
    optimizer.step()
    assert same(kept, snapshot(first, master, optimizer.state[master]))
    assert not same(before, snapshot(others))


@each_case
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_frozen_parameter_is_followed_and_not_written(case, steps_before):
    if steps_before == 0 and "fused momentum" in case.limits:
        pytest.skip("torch's fused SGD cannot start the momentum of one parameter later than that of others")
    (network, optimizer), hand = case.build(**STATIC), ByHand(case)
    pairs = [(next(network.parameters()), masters_of(optimizer)[0]), (hand.params[0], hand.masters[0])]
    # By default torch zeroes the gradient of a parameter that is its own master, and momentum moves it for zeros.
    way = "deferred" if pairs[0][0].dtype == torch.float32 else "at once"

    def steps(*numbers):
        for i in numbers:
            step(network, optimizer, i, way=way)
            hand.step(i)
            optimizer.state_dict()  # masters follow here too
            assert same(snapshot(network, optimizer), snapshot(hand.network, hand.optimizer)), i

    def freeze(frozen):
        for param, _ in pairs:
            param.requires_grad_(not frozen)

    steps(*range(steps_before))
    freeze(True)
    steps(2)  # the masters keep bits that the parameters lack
    for i in (4, 5):  # a moving average, or pretrained weights
        for param, _ in pairs:
            param.data.mul_(0.75).add_(0.25)
        pairs[1][1].data.copy_(pairs[1][0])
        steps(i)
    for param, _ in pairs:
        param.data.mul_(0.5)
    pairs[1][1].data.copy_(pairs[1][0])
    freeze(False)
    steps(6)
