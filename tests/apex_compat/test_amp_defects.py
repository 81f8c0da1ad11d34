"""The defects of apex.amp: those that are repaired here, and those that scripts may count on. One function each."""

import gc
import inspect
import warnings
import weakref
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_cases import (  # noqa: F401
    INF,
    OPTIMIZERS,
    ORIGINAL,
    Net,
    amp,
    backward,
    changed,
    images,
    initialize,
    mlp,
    now,
    o1,
    torch_as_it_was,
)
from apex_compat.optimizers import FusedSGD
from apex_compat.parallel import LARC
from fp16_cases import same, snapshot


def sgd(network):
    return OPTIMIZERS["sgd"](network.parameters())


def fused_sgd(network, **kwargs):
    return FusedSGD(network.parameters(), lr=0.1, momentum=0.9, **kwargs)


def set_up(level, build=mlp, **kwargs):
    network = build()
    return initialize(network, sgd(network), opt_level=level, **kwargs)


def loss_of(network, rows=3):
    return network(torch.ones(rows, 4)).float().mean() / 64  # at 2**16 no gradient overflows in half


# --- repaired


def a_weight_is_used_twice_in_an_iteration():
    network, optimizer = set_up("O1", lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2))
    for _ in range(2):
        backward(loss_of(network), optimizer)
        optimizer.step()
        optimizer.zero_grad()


def gradients_may_be_zeroed_or_dropped():
    network, optimizer = set_up("O2")
    for kwargs, gone in (({}, False), ({"set_to_none": False}, False), ({"set_to_none": True}, True)):
        backward(loss_of(network), optimizer)
        optimizer.zero_grad(**kwargs)
        assert all((p.grad is None) == gone for p in network.parameters()), kwargs
        assert gone or all(p.grad.abs().sum() == 0 for p in network.parameters())
        assert all(p.grad is None for p in amp.master_params(optimizer))


def a_step_may_come_before_a_backward():
    network, optimizer = set_up("O2")
    before = snapshot(network)
    optimizer.step()
    assert same(before, snapshot(network))


def schedulers_do_not_warn():
    for level, wrap in product(("O0", "O1", "O2", "O3"), (lambda optimizer: optimizer, LARC)):
        network = mlp()
        inner = sgd(network)
        optimizer = wrap(inner)
        schedulers = [torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)]
        network, optimizer = initialize(network, optimizer, opt_level=level, loss_scale="dynamic")
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
        for i in range(3):
            optimizer.zero_grad()
            backward(loss_of(network) * (INF if i == 0 else 1.0), optimizer)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()  # a warning would be an error
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**6)


def the_scale_never_reaches_0():
    network, optimizer = set_up("O1")
    (scaler,) = amp._amp_state.loss_scalers
    scaler._loss_scale = 2.0**-98
    for expected in (2.0**-99, 2.0**-100, 2.0**-100, 2.0**-100):
        backward(loss_of(network) * INF, optimizer)
        assert scaler.loss_scale() == expected


def a_static_scale_can_check_for_overflow():
    for level in ("O0", "O1", "O2", "O3"):
        network, optimizer = set_up(level, loss_scale=128.0, check_overflow=True)
        before = snapshot(list(network.parameters()))
        backward(loss_of(network) * INF, optimizer)
        optimizer.step()
        assert same(before, snapshot(list(network.parameters())))
        assert amp._amp_state.loss_scalers[0].loss_scale() == 128.0
        optimizer.zero_grad()
        backward(loss_of(network), optimizer)
        optimizer.step()
        assert not same(before, snapshot(list(network.parameters())))


def a_replica_runs_its_own_weights():
    """Return what torch's DataParallel makes of a model."""
    for level in ("O0", "O2", "O3"):
        network, _ = set_up(level, lambda: nn.Linear(4, 1))
        replica = network._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.zeros_like(network.weight), torch.zeros_like(network.bias)
        for call in (replica, replica.forward):
            assert call(torch.ones(1, 4)).abs().sum() == 0
            assert call(torch.ones(1, 4)).dtype == torch.float32


def casts_come_back_after_an_exception():
    o1()
    with pytest.raises(KeyError), amp.disable_casts():
        raise KeyError
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float16


def disable_casts_does_nothing_without_o1():
    with amp.disable_casts():
        pass
    for level in ("O0", "O2", "O3"):
        set_up(level)
        with amp.disable_casts():
            pass


def an_exception_inside_scale_loss_loses_no_gradient():
    for level in ("O0", "O1", "O2", "O3"):
        network, optimizer = set_up(level, loss_scale=128.0)
        backward(loss_of(network), optimizer)
        before = snapshot([p.grad for p in amp.master_params(optimizer)])
        with pytest.raises(KeyError), amp.scale_loss(loss_of(network), optimizer):
            raise KeyError
        assert same(before, snapshot([p.grad for p in amp.master_params(optimizer)])), level
        backward(loss_of(network), optimizer)
        doubled = [grad * 2 for grad in before]
        assert same(doubled, snapshot([p.grad for p in amp.master_params(optimizer)])), level
        optimizer.step()


def a_tuple_of_optimizers_is_a_list():
    for level in ("O1", "O2"):
        networks = [mlp(), mlp()]
        networks, optimizers = initialize(networks, [sgd(n) for n in networks], opt_level=level)
        for _ in range(2):
            backward(loss_of(networks[0]) + loss_of(networks[1]), tuple(optimizers))
        single = mlp()
        single, optimizer = initialize(single, sgd(single), opt_level=level)
        for _ in range(2):
            backward(loss_of(single), optimizer)
        expected = [p.grad for p in amp.master_params(optimizer)]
        for each in optimizers:
            assert same(expected, [p.grad for p in amp.master_params(each)])


def nothing_is_banned_where_casts_are_disabled():
    x = torch.full((2,), 0.5, dtype=torch.float16)
    o1()
    with amp.disable_casts():
        assert F.binary_cross_entropy(x, x).dtype == torch.float16
        x.exp_()
        torch.exp_(x)


def a_second_initialize_starts_afresh():
    network, optimizer = set_up("O1")
    backward(loss_of(network), optimizer)
    patched = {name: now("F", name) for name in ("linear", "softmax")}
    gone = [weakref.ref(part) for part in (network, optimizer, network[0].weight)]
    first = amp._amp_state.handle
    del network, optimizer
    network, optimizer = set_up("O1")
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    backward(loss_of(network), optimizer)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert patched.keys() == {"linear", "softmax"}
    if amp._amp_state.handle is not first:
        assert not first.is_active()
    amp._amp_state.handle._deactivate()
    assert changed() == []
    assert now("F", "linear") is ORIGINAL["F", "linear"]


def another_level_takes_the_casts_away():
    o1()
    set_up("O2")
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32
    o1()
    amp.initialize(mlp(), enabled=False)
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32


def a_penalty_on_gradients_works_with_batchnorm():
    for level in ("O1", "O2"):
        network, optimizer = set_up(level, Net)
        x = images(0)[0].requires_grad_()
        out = network(x).float().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        backward(out + grad.float().square().sum(), optimizer)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in network.parameters())


def a_model_on_a_cpu_is_welcome():
    for level in ("O0", "O1", "O2", "O3"):
        network, optimizer = set_up(level)
        backward(loss_of(network), optimizer)
        optimizer.step()


def tensors_elsewhere_are_not_cast():
    """A model on one device leaves tensors on another alone."""
    x = torch.ones(2, 2, device="meta")
    o1()
    assert (x @ x).dtype == torch.float32
    assert F.softmax(x.half(), dim=0).dtype == torch.float16


def a_frozen_weight_moved_by_hand_stays():
    """A momentum encoder, as MoCo and BYOL have one, is in the optimizer but updated by hand."""
    for build in (sgd, fused_sgd, lambda n: fused_sgd(n, materialize_master_grads=False)):
        network = mlp()
        network[0].requires_grad_(False)
        network, optimizer = initialize(network, build(network), opt_level="O2")
        for value in (0.25, 0.5):
            optimizer.zero_grad()
            backward(loss_of(network), optimizer)
            network[0].weight.data.fill_(value)
            optimizer.step()
            assert (network[0].weight == value).all()


def a_weight_may_be_frozen_and_unfrozen_between_steps():
    """Every way to accumulate, and the new values that a weight was given while it was frozen."""
    for delay in ((False,), (False, False), (True, False), (True, True)):
        network, optimizer = set_up("O2", loss_scale=128.0)
        layer = network[0]
        for frozen, value in ((True, 0.25), (False, 0.5), (True, 0.125), (False, 2.0)):
            layer.requires_grad_(not frozen)
            layer.weight.data.fill_(value)
            optimizer.zero_grad()
            for delay_unscale in delay:
                backward(loss_of(network) * 64, optimizer, delay_unscale=delay_unscale)
            if delay[-1]:  # a script that unscales by itself
                masters = amp.master_params(optimizer)
                for half, master in zip(network.parameters(), masters, strict=True):
                    master.grad = None if half.grad is None else half.grad.float() / 128
            optimizer.step()
            moved = (layer.weight.float() - value).abs()
            assert (moved == 0).all() if frozen else 0 < moved.max() < value / 2, (delay, frozen, value)


def gradients_may_be_views():
    """What torch's DistributedDataParallel(gradient_as_bucket_view=True) leaves in the model."""
    network, optimizer = set_up("O2")
    for kwargs in ({}, {"set_to_none": True}):
        buckets = [torch.ones(p.numel(), dtype=p.dtype) for p in network.parameters()]
        for param, bucket in zip(network.parameters(), buckets, strict=True):
            param.grad = bucket.view_as(param)
        optimizer.zero_grad(**kwargs)
        assert all((bucket == len(kwargs)).all() for bucket in buckets)
        assert all((p.grad is None) == bool(kwargs) for p in network.parameters())


def a_gradient_with_a_graph_is_zeroed_without_it():
    network, optimizer = set_up("O2")
    with amp.scale_loss(loss_of(network), optimizer) as scaled, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a reference cycle
        scaled.backward(create_graph=True)
    optimizer.zero_grad()
    assert not any(p.grad.requires_grad or p.grad.any() for p in network.parameters())


def a_model_with_dtype_and_device_is_no_tensor():
    """A decorated method gets its model as an argument, and the models of transformers have both."""

    class Model(nn.Linear):
        device = property(lambda self: self.weight.device)
        dtype = property(lambda self: self.weight.dtype)

        def seen(self, x, y=None):
            return x.dtype, self.weight.dtype

        half = amp.half_function(seen)
        floating = amp.float_function(seen)
        promoted = amp.promote_function(seen)

    model, x = Model(2, 2), torch.ones(2)
    initialize(model)
    assert model.half(x) == (torch.float16, torch.float32)
    assert model.floating(x.half()) == (torch.float32, torch.float32)
    assert model.promoted(x.half()) == (torch.float16, torch.float32)
    assert model.promoted(x.half(), x) == (torch.float32, torch.float32)
    nn.Module.half(model)
    assert model.half(x) == (torch.float16, torch.float16)
    assert model.floating(x.half()) == (torch.float32, torch.float16)
    assert model.promoted(x.half(), x) == (torch.float32, torch.float16)


def o1_casts_on_the_accelerator_for_a_model_that_moves_there_later():
    x = torch.ones(2, 2, device="meta")
    for models in ([], mlp()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.accelerator, "is_available", lambda: True)
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
            initialize(models, sgd(mlp()))
        assert (x @ x).dtype == torch.float16
    initialize([], sgd(mlp()))
    assert now("F", "linear")(torch.ones(1, 1), torch.ones(1, 1)).dtype == (
        torch.float32 if torch.accelerator.is_available() else torch.float16
    )


def a_static_method_stays_one_when_the_casts_go():
    class Losses:
        @staticmethod
        def own(x):
            return x.dtype

        @classmethod
        def of_class(cls, x):
            return cls, x.dtype

    class Heir(Losses):
        pass

    for owner, name in ((Losses, "own"), (Losses, "of_class"), (Heir, "own")):
        amp.register_half_function(owner, name)
    x = torch.ones(1)
    for dtype in (torch.float16, torch.float32):
        if dtype == torch.float16:
            o1()
        else:
            amp._amp_state.handle._deactivate()
        assert Losses().own(x) == Losses.own(x) == Heir().own(x) == dtype
        assert Losses().of_class(x) == Losses.of_class(x) == (Losses, dtype)
    assert Heir.of_class(x) == (Heir, torch.float32)


def o1_may_be_switched_on_within_disable_casts():
    with amp.disable_casts():
        o1()
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float16
    with amp.disable_casts():
        amp._amp_state.handle._deactivate()
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.float32


def complex_parameters_are_unscaled():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    _, optimizer = initialize(nn.ParameterList([weight]), torch.optim.SGD([weight], lr=1.0), loss_scale=128.0)
    for times in (1, 2):
        backward((weight * (2 + 1j)).real.sum(), optimizer)
        assert weight.grad.tolist() == [times * (2 - 1j)] * 2
    amp._amp_state.loss_scalers[0].check_overflow = True
    backward((weight * INF).real.sum(), optimizer)
    optimizer.step()
    assert weight.tolist() == [1, 1]


def a_static_scale_is_saved_as_it_was_given():
    set_up("O2", loss_scale=0.1)
    state = amp.state_dict()
    assert state["loss_scaler0"]["loss_scale"] == amp._amp_state.loss_scalers[0].loss_scale() == 0.1
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 0.3, "unskipped": 0}})
    assert amp.state_dict()["loss_scaler0"]["loss_scale"] == 0.3


def a_scale_may_grow_without_a_bound():
    set_up("O1", max_loss_scale=INF)
    (scaler,) = amp._amp_state.loss_scalers
    assert scaler.loss_scale() == 2.0**16
    for scale in (2.0**24, 2.0**126, 2.0**127):
        scaler._loss_scale, scaler._unskipped = scale, 1999
        scaler.update_scale()
        assert scaler.loss_scale() == min(2 * scale, 2.0**127)


def forward_may_be_called_directly():
    """GANs do so: self.netG.forward(x). A script may have put its own there, and hooks, before and after."""

    class Shifted(nn.Linear):
        def forward(self, input, *, shift=0.0):
            return super().forward(input) + shift

    x, seen = torch.ones(1, 4), []

    def note(module, given, out=None):
        seen.append((given[0] if out is None else out).dtype)

    for level in ("O0", "O2", "O3"):
        for own in (None, lambda input, *, shift=0.0: input.sum() + shift):
            network = Shifted(4, 4)
            if own:
                network.forward = own
            network.register_forward_pre_hook(note)
            network.register_forward_hook(note)
            for again in (level, "O2", level):
                initialize(network, opt_level=again)
                assert network.forward(x.double(), shift=x[0]).dtype == torch.float32
                assert torch.equal(network.forward(x.double(), shift=x[0]), network(x.double(), shift=x[0]))
                assert list(inspect.signature(network.forward).parameters) == ["input", "shift"]
                assert seen == [torch.float64, torch.float32]
                seen.clear()
                network.float()
            initialize(network, opt_level="O1")
            assert network.forward(x.half()).dtype == (torch.float32 if own else torch.float16)
            assert own is None or network.forward is own


REPAIRED = [
    forward_may_be_called_directly,
    a_model_with_dtype_and_device_is_no_tensor,
    o1_casts_on_the_accelerator_for_a_model_that_moves_there_later,
    a_static_method_stays_one_when_the_casts_go,
    o1_may_be_switched_on_within_disable_casts,
    complex_parameters_are_unscaled,
    a_static_scale_is_saved_as_it_was_given,
    a_scale_may_grow_without_a_bound,
    gradients_may_be_views,
    a_gradient_with_a_graph_is_zeroed_without_it,
    a_frozen_weight_moved_by_hand_stays,
    a_weight_may_be_frozen_and_unfrozen_between_steps,
    a_weight_is_used_twice_in_an_iteration,
    gradients_may_be_zeroed_or_dropped,
    a_step_may_come_before_a_backward,
    schedulers_do_not_warn,
    the_scale_never_reaches_0,
    a_static_scale_can_check_for_overflow,
    a_replica_runs_its_own_weights,
    casts_come_back_after_an_exception,
    disable_casts_does_nothing_without_o1,
    an_exception_inside_scale_loss_loses_no_gradient,
    a_tuple_of_optimizers_is_a_list,
    nothing_is_banned_where_casts_are_disabled,
    a_second_initialize_starts_afresh,
    another_level_takes_the_casts_away,
    a_penalty_on_gradients_works_with_batchnorm,
    a_model_on_a_cpu_is_welcome,
    tensors_elsewhere_are_not_cast,
]


# --- kept


def a_part_of_an_o2_model_called_directly_takes_half_alone():
    network, _ = set_up("O2")
    with pytest.raises(RuntimeError, match="dtype"):
        network[0](torch.ones(1, 4))
    assert network[0](torch.ones(1, 4).half()).dtype == torch.float16


def weights_of_a_loss_inside_an_o2_model_are_half():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.loss = nn.CrossEntropyLoss(torch.ones(3))

        def forward(self, x):
            return self.layer(x)

    network, _ = set_up("O2", WithLoss)
    assert network.loss.weight.dtype == torch.float16


def o1_prints_its_message_on_batchnorm():
    network = mlp()
    with pytest.raises(RuntimeError, match=r"(?i)batchnorm functions are automatically patched"):
        initialize(network, sgd(network), opt_level="O1", keep_batchnorm_fp32=True)


def a_skipped_step_keeps_the_models_gradients():
    network, optimizer = set_up("O2")
    backward(loss_of(network) * INF, optimizer)
    optimizer.step()
    assert all(p.grad is None for p in amp.master_params(optimizer))
    assert all(p.grad is not None for p in network.parameters())


def only_new_gradients_are_checked():
    network, optimizer = set_up("O1")
    backward(loss_of(network), optimizer)
    next(network.parameters()).grad.fill_(INF)
    backward(loss_of(network), optimizer)
    assert amp._amp_state.loss_scalers[0].loss_scale() == 2.0**16


def a_large_sum_of_gradients_is_no_overflow():
    network = nn.Linear(4, 1, bias=False)
    network, optimizer = initialize(network, sgd(network), opt_level="O0", loss_scale="dynamic")
    amp._amp_state.loss_scalers[0]._loss_scale = 1.0
    backward(network(torch.full((1, 4), 3e38)).sum(), optimizer)
    assert amp._amp_state.loss_scalers[0].loss_scale() == 1.0


KEPT = [
    a_part_of_an_o2_model_called_directly_takes_half_alone,
    weights_of_a_loss_inside_an_o2_model_are_half,
    o1_prints_its_message_on_batchnorm,
    a_skipped_step_keeps_the_models_gradients,
    only_new_gradients_are_checked,
    a_large_sum_of_gradients_is_no_overflow,
]


@pytest.mark.parametrize("check", REPAIRED, ids=lambda check: check.__name__)
def test_repaired(check):
    check()


@pytest.mark.parametrize("check", KEPT, ids=lambda check: check.__name__)
def test_kept(check):
    check()


@pytest.mark.slow
def test_torch_exports_and_compiles_a_cast_model():
    network, _ = set_up("O2")
    x = torch.ones(2, 4)
    assert torch.equal(torch.export.export(network, (x,)).module()(x), network(x))
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))


def test_a_static_scale_says_once_that_inf_is_applied(capsys):
    network, optimizer = set_up("O2", loss_scale=128.0, verbosity=1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(loss_of(network) * INF, optimizer)
        optimizer.step()
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("check_overflow") == 1
