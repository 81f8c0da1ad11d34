"""Time of one FP16_Optimizer step against the same step written as a loop over parameters.

    python -m benchmarks.fp16_optimizer [--device cuda] [--steps 30] [--threads 1]

The step is `update_master_grads + clip_master_grads + step` with SGD on float16 parameters of the shapes of
the default language model (2-layer LSTM, 200 units, a vocabulary of 31600: 13.3 million parameters). All
variants run interleaved in one process, so that a change of the machine's pace meets all of them; the medians
are compared.

Two loops are measured, which differ in one line. One copies the gradients to new tensors
(`param.grad.float()`), as it must after torch's default `zero_grad()`, which drops the old ones; the other
copies them into tensors that are kept. FP16_Optimizer keeps them as long as its caller does.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fp16_utils import FP16_Optimizer

VOCABULARY, WIDTH, LAYERS = 31600, 200, 2
SCALE, MAX_NORM, LR = 1024.0, 0.25, 1e-3


def half_params(device: str) -> list[Tensor]:
    """Return float16 parameters with gradients, of the default model's shapes."""
    lstm = [(4 * WIDTH, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (4 * WIDTH,)] * LAYERS
    shapes = [(VOCABULARY, WIDTH), *lstm, (VOCABULARY, WIDTH), (VOCABULARY,)]
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.randn(shape, generator=generator, device=device).half().requires_grad_()
        param.grad = torch.randn(shape, generator=generator, device=device).half()
        params.append(param)
    return params


def loop_step(device: str, keep_buffers: bool) -> Callable[[], None]:
    """Return the step as a loop over parameters: copy, mul_, sum-check, clip_grad_norm_, SGD.step, copy_."""
    params = half_params(device)
    masters = [param.detach().float().requires_grad_() for param in params]
    optimizer = torch.optim.SGD(masters, lr=LR, foreach=False)

    @torch.no_grad()
    def step() -> None:
        overflow = False
        for param, master in zip(params, masters, strict=True):
            assert param.grad is not None
            if keep_buffers and master.grad is not None:
                master.grad.copy_(param.grad)
            else:
                master.grad = param.grad.float()
            master.grad.mul_(1 / SCALE)
            overflow |= not math.isfinite(param.grad.float().sum().item())
        if overflow:
            return
        torch.nn.utils.clip_grad_norm_(masters, MAX_NORM, foreach=False)
        optimizer.step()
        for param, master in zip(params, masters, strict=True):
            param.copy_(master)

    return step


def optimizer_step(device: str, fused: bool) -> Callable[[], None]:
    """Return the step of FP16_Optimizer."""
    inner = torch.optim.SGD(half_params(device), lr=LR, fused=fused)
    optimizer = FP16_Optimizer(inner, static_loss_scale=SCALE, verbose=False)

    def step() -> None:
        optimizer.update_master_grads()
        optimizer.clip_master_grads(MAX_NORM)
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Return the time of one call, the device's work included."""
    begin = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure, and print a line for each variant."""
    parser = argparse.ArgumentParser(description="Time FP16_Optimizer against a loop over parameters.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    variants = {
        "loop, new gradient tensors": loop_step(args.device, keep_buffers=False),
        "loop, kept gradient tensors": loop_step(args.device, keep_buffers=True),
        "FP16_Optimizer(SGD)": optimizer_step(args.device, fused=False),
        "FP16_Optimizer(SGD, fused)": optimizer_step(args.device, fused=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(args.steps + 3):
        for name, step in variants.items():
            taken = seconds(step, args.device)
            if i >= 3:  # the first calls allocate
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    new, kept = list(medians.values())[:2]
    print(f"{'ms':>37} {'of loop, new':>14} {'of loop, kept':>14}")
    for name, median in medians.items():
        print(f"{name:28} {median * 1e3:8.2f} {median / new:14.2f} {median / kept:14.2f}")


if __name__ == "__main__":
    main()
