"""The limits of this machine: the rate of matrix products and the bandwidth of a copy."""

import time
from collections.abc import Callable

import torch

from benchmarks.measure import Row
from lm.model.kernels import cpu_multiplies

EDGE = 3072  # of the square matrices
COPIED = 1 << 28  # bytes: far more than caches hold
REPETITIONS = 5


def best(function: Callable[[], object]) -> float:
    """Return the shortest time of a few calls, in seconds."""
    times = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_peaks() -> list[Row]:
    """Measure GFLOP/s in each dtype, and GB/s read plus written by a copy."""
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        edge = EDGE if dtype is torch.float32 or cpu_multiplies(dtype) else 512
        a, b, c = (torch.randn(edge, edge).to(dtype) for _ in range(3))
        seconds = best(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))  # type: ignore[misc]
        name = f"{str(dtype).removeprefix('torch.')} product"
        rows.append({"part": "peaks", "size": None, "name": name, "value": 2 * edge**3 / seconds / 1e9})
        rows[-1]["unit"] = "GFLOP/s"
    source, target = torch.ones(COPIED // 4), torch.ones(COPIED // 4)
    seconds = best(lambda: target.copy_(source))
    rows.append({"part": "peaks", "size": None, "name": "copy", "value": 2 * COPIED / seconds / 1e9, "unit": "GB/s"})
    return rows


def share_of_peak(step: Row, peaks: list[Row], tokens: int, vocabulary: int, layers: int = 2) -> float:
    """Return the share of a step's time that its matrix products would take at the peak rate.

    Forward and backward of the decoder and of the LSTM: 6 FLOP a token and weight.
    """
    rates: dict[str, float] = {row["name"]: row["value"] for row in peaks}
    size, seconds = int(step["size"]), float(step["ours"]["median"])
    half = torch.bfloat16 if "bf16" in step["name"] else torch.float16
    dtype = half if "fp32" not in step["name"] and cpu_multiplies(half) else torch.float32
    rate = rates[f"{str(dtype).removeprefix('torch.')} product"]
    return 6 * tokens * (vocabulary * size + layers * 8 * size**2) / rate / 1e9 / seconds
