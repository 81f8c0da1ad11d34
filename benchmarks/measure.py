"""Interleaved timings, what is made of them, and the machine they were taken on."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roundoff.device import device_name

REFERENCE = "reference"
WARM_UP = 2  # rounds that are not counted: the first calls allocate, and choose kernels
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")

Row = dict[str, Any]


class Cost(NamedTuple):
    """What something takes.

    Attributes:
        seconds: of each repetition.
        mib: peak memory of its process.
    """

    seconds: list[float]
    mib: float


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Time `rounds` calls of each of `variants` in turn (A B C A B C ...); return the seconds of each.

    A machine that slows down then slows all of them. `prepare` holds what runs before a call, untimed. A call has
    ended when `device` has done all that it was given.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(WARM_UP + rounds):
        for name, variant in variants.items():
            if prepare and name in prepare:
                prepare[name]()
            synchronise(device)
            start = clock()
            variant()
            synchronise(device)
            if i >= WARM_UP:
                times[name].append(clock() - start)
    return times


def synchronise(device: str) -> None:
    """Wait until `device` has done all that it was given; a CPU has done it already."""
    kind = torch.device(device).type
    if kind != "cpu":
        torch.get_device_module(kind).synchronize(*([] if kind == "mps" else [device]))


def spread(values: list[float]) -> dict[str, float]:
    """Return median, quartiles and extremes."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": statistics.median(values),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": min(values),
        "max": max(values),
    }


def compared(part: str, size: int | None, times: dict[str, list[float]], *, faster: bool) -> list[Row]:
    """Return a row for each of `times` but the reference.

    A ratio is taken between neighbours of one round. It is reference / ours if `faster`, which says how many times
    faster ours is, else ours / reference.
    """
    rows = []
    for name, values in times.items():
        if name == REFERENCE:
            continue
        pairs = zip(times[REFERENCE], values, strict=True)
        ratios = [reference / own if faster else own / reference for reference, own in pairs]
        rows.append(
            {
                "part": part,
                "size": size,
                "name": name,
                "ratio_is": "reference / ours" if faster else "ours / reference",
                "ratio": spread(ratios),
                "ours": spread(values),
                "reference": spread(times[REFERENCE]),
                "unit": "s",
                "rounds": len(values),
            }
        )
    return rows


def new_file(text: str) -> Path:
    """Return the path of a file to write, for argparse: what was measured for minutes must have a place to go.

    Raises:
        argparse.ArgumentTypeError: there is no such folder.
    """
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no folder that is there; make {str(path.parent)!r} first")
    return path


def old_file(text: str) -> Path:
    """Return the path of a file to read, for argparse.

    Raises:
        argparse.ArgumentTypeError: there is no such file.
    """
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}; give one that --json has written")
    return Path(text)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine, as far as the figures on `device` depend on it."""
    features = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
        features = [feature for feature in CPU_FEATURES if feature in flags]
    return {
        "processor": device_name("cpu"),
        "device": device if device == "cpu" else device_name(device),
        "instructions": features,
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(row: Row) -> str:
    """Return `row` as a line."""
    what = f"{row['part']:9} {row['size'] or '':>4} {row['name']:36}"
    if "ratio" not in row:
        return f"{what} {row['value']:8.2f} {row['unit']}"
    ratio = row["ratio"]
    scale, unit = (1e3, "ms") if row["unit"] == "s" else (1.0, row["unit"])
    return (
        f"{what} {ratio['median']:6.2f}  ({ratio['q1']:.2f} to {ratio['q3']:.2f})  {row['ratio_is']}: "
        f"{row['reference']['median'] * scale:.1f}, {row['ours']['median'] * scale:.1f} {unit}, {row['rounds']} rounds"
    )
