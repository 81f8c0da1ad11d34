"""The limits of a device: the rate of matrix products and the bandwidth of a copy."""

import time
from collections.abc import Callable

import torch

from benchmarks.measure import Row, synchronise
from lm.model.kernels import cpu_multiplies
from roundoff.device import set_tf32

EDGE, GPU_EDGE = 3072, 8192  # of the square matrices
COPIED = 1 << 28  # bytes: far more than caches hold
REPETITIONS = 5


def best(function: Callable[[], object], device: str) -> float:
    """Return the shortest time of a few calls, in seconds, each to its end on `device`."""
    times = []
    for _ in range(REPETITIONS + 1):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_peaks(device: str = "cpu") -> list[Row]:
    """Measure GFLOP/s in each dtype, on a GPU with TF32 too, and GB/s read plus written by a copy."""
    rows: list[Row] = []
    kinds = [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False)]
    if device.startswith("cuda"):
        kinds.insert(1, (torch.float32, True))
    for dtype, tf32 in kinds:
        a, b, c = (torch.randn(*2 * [_edge(dtype, device)], device=device).to(dtype) for _ in range(3))
        if device.startswith("cuda"):
            set_tf32(tf32)
        seconds = best(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device)  # type: ignore[misc]
        name = "tf32 product" if tf32 else product(dtype)
        rows.append(_row(name, 2 * len(a) ** 3 / seconds / 1e9, "GFLOP/s"))
    if device.startswith("cuda"):
        set_tf32(False)
    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    seconds = best(lambda: target.copy_(source), device)
    return [*rows, _row("copy", 2 * COPIED / seconds / 1e9, "GB/s")]


def product(dtype: torch.dtype) -> str:
    """Return the name of the row of products in `dtype`."""
    return f"{str(dtype).removeprefix('torch.')} product"


def _edge(dtype: torch.dtype, device: str) -> int:
    if device != "cpu":
        return GPU_EDGE
    return EDGE if dtype is torch.float32 or cpu_multiplies(dtype) else 512


def _row(name: str, value: float, unit: str) -> Row:
    return {"part": "peaks", "size": None, "name": name, "value": value, "unit": unit}


def share_of_peak(
    step: Row, peaks: list[Row], tokens: int, vocabulary: int, device: str = "cpu", layers: int = 2
) -> float:
    """Return the share of a step's time on `device` that its matrix products would take at the peak rate.

    Forward and backward of the decoder and of the LSTM: 6 FLOP a token and weight.
    """
    rates: dict[str, float] = {row["name"]: row["value"] for row in peaks}
    size, seconds = int(step["size"]), float(step["ours"]["median"])
    half = torch.bfloat16 if "bf16" in step["name"] else torch.float16
    multiplies = device != "cpu" or cpu_multiplies(half)
    rate = rates[product(half if "fp32" not in step["name"] and multiplies else torch.float32)]
    return 6 * tokens * (vocabulary * size + layers * 8 * size**2) / rate / 1e9 / seconds
