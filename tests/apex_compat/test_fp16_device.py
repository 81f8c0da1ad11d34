"""What waits for the device, how many passes a step takes, and devices other than the CPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp16_cases import OPTIMIZERS, loss_of, mixed, mlp, problem, snapshot, train, wrap


class DeviceSkippingSGD(torch.optim.SGD):
    """SGD that, as a fused one, skips by the found-inf tensor; torch's own refuses the meta device."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        assert self.grad_scale is None
        for group in self.param_groups:
            grads = [p.grad for p in group["params"]]
            factor = torch.where(self.found_inf.bool(), 0.0, group["lr"])
            with torch.no_grad():
                torch._foreach_sub_(group["params"], torch._foreach_mul(grads, factor))


class Operations(TorchDispatchMode):
    """Records the operations by name, and counts those that fetch a value from the device."""

    FETCH = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def reads(self):
        return sum(name in self.FETCH for name in self.names)


def finish_step(optimizer):
    optimizer.update_master_grads()
    optimizer.clip_master_grads(0.5)
    optimizer.step()


KINDS = {
    "plain": (lambda p: OPTIMIZERS["momentum"](p), {}, 1),
    "fused": (lambda p: OPTIMIZERS["sgd"](p, fused=True), {}, 0),
    "fused momentum": (lambda p: OPTIMIZERS["momentum"](p, fused=True), {}, 0),
    "fused adam": (lambda p: OPTIMIZERS["adam"](p, fused=True), {}, 0),
    "plain, unchecked": (lambda p: OPTIMIZERS["momentum"](p), {"check_overflow": False}, 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verbose", [False, True])
def test_a_step_reads_one_value_and_none_with_a_fused_optimizer(kind, verbose):
    make, kwargs, expected = KINDS[kind]
    for dynamic in (False, True) if not kwargs else (False,):
        network = mixed()
        optimizer = wrap(make(network.parameters()), dynamic_loss_scale=dynamic, verbose=verbose, **kwargs)
        for _ in range(3):
            network.zero_grad()
            with Operations() as seen:
                optimizer.backward(loss_of(network, *problem()), update_master_grads=False)
                finish_step(optimizer)
            assert seen.reads == expected


def test_the_scaling_passes_do_not_grow_with_the_number_of_parameters():
    counts = []
    for layers in (2, 12):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)), nn.Linear(4, 3)).half()
        optimizer = wrap(OPTIMIZERS["sgd"](network.parameters(), fused=True), dynamic_loss_scale=True)
        train(network, optimizer, steps=1)
        network.zero_grad()
        optimizer.backward(loss_of(network, *problem()), update_master_grads=False)
        with Operations() as seen:
            finish_step(optimizer)
        # The norm needs a view of each tensor's norm to stack them; torch's own clipping makes the same.
        counts.append([name for name in seen.names if name not in {"unsqueeze", "stack", "cat", "detach"}])
        assert counts[-1].count("_foreach_copy_") == 2
        assert counts[-1].count("_amp_foreach_non_finite_check_and_unscale_") == 1
        assert counts[-1].count("_foreach_norm") == 1
        assert counts[-1].count("_foreach_mul_") == 1
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_runs_on_the_meta_device(dynamic, monkeypatch):
    def refuse(self):
        raise AssertionError("a value was fetched from the device")

    network = mixed().to("meta")
    groups = [{"params": list(network[i].parameters())} for i in (0, 3)]
    optimizer = wrap(DeviceSkippingSGD(groups, lr=0.1), static_loss_scale=8.0, dynamic_loss_scale=dynamic)
    monkeypatch.setattr(torch.Tensor, "item", refuse)
    x, y = torch.empty(2, 4, device="meta", dtype=torch.float16), torch.empty(2, 3, device="meta")
    for _ in range(2):
        network.zero_grad()
        for _ in range(2):
            optimizer.backward((network(x) - y).square().mean(), update_master_grads=False)
        optimizer.update_master_grads()
        norm = optimizer.clip_master_grads(0.5)
        optimizer.step()
        for scalar in (norm, optimizer.loss_scale_tensor, optimizer.found_inf):
            assert (scalar.shape, scalar.dtype, scalar.device.type) == ((), torch.float32, "meta")


def test_an_optimizer_that_skips_by_the_tensor_is_told():
    network = mlp(torch.float16)
    optimizer = wrap(DeviceSkippingSGD(network.parameters(), lr=0.1), static_loss_scale=64.0)
    before = snapshot(list(network.parameters()))
    optimizer.backward(loss_of(network, *problem()))
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert not {"found_inf", "grad_scale"} & set(vars(optimizer.optimizer))


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [False, True])
def test_cuda_steps_do_not_synchronise(fused):
    network = mixed().cuda()
    x, y = (t.cuda() for t in problem())
    inner = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=fused)
    optimizer = wrap(inner, dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 64.0})
    losses = []
    for _ in range(20):
        network.zero_grad()
        loss = loss_of(network, x, y)
        optimizer.backward(loss, update_master_grads=False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.update_master_grads()
            optimizer.clip_master_grads(1.0)
            if fused:
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not fused:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
