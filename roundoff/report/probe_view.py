"""The figures of a probe's result, as its table and its panels need them.

`roundoff.gradients.result.read_probe` returns such a result. A figure in it may be None, which is nan here.
"""

from typing import Any

import numpy as np

from roundoff.report.panels import Floats

Result = dict[str, Any]

TOTAL = "all parameters"
FAINTEST = 1e-6
"""A share that is drawn as weakly as any below it."""

COLOURS = (
    *((0.0, "#08306b"), (0.25, "#3f8fc5"), (0.49, "#e3eefa"), (0.5, "#ffffff")),
    *((0.51, "#ffffff"), (0.75, "#fdb07a"), (0.88, "#e6650d"), (1.0, "#7f2704")),
)
"""From `heat` -1 to 1, as shares of that way: all flushed, nothing lost, all overflowed."""

SHADES = {
    -1.0: "all flushed",
    -2 / 3: "1%",
    -1 / 3: "0.01%",
    0.0: "0",
    0.5: "<0.0001%",
    1.0: "all overflow",
}
"""The meaning of some values of `heat`."""


def modes(result: Result) -> list[str]:
    """Return the names of the modes, in the order in which they were asked for."""
    return list(result["modes"])


def tensors(result: Result) -> list[str]:
    """Return the names of the tensors, in the order of the forward pass."""
    return [tensor["name"] for tensor in result["tensors"]]


def figures(result: Result, mode: str, tensor: str | None = None) -> dict[str, float | None]:
    """Return all figures of `tensor` in `mode`, by their names; None stands for all parameters together."""
    of_mode = result["modes"][mode]
    found: dict[str, float | None] = of_mode["total"] if tensor is None else of_mode["tensors"][tensor]
    return found


def column(result: Result, mode: str, figure: str) -> Floats:
    """Return `figure` in `mode`: of all parameters together, then of each tensor; nan where there is none.

    None is larger than 1e37, nor smaller than 1e-37 unless it is 0, so that axes can reckon with them.
    """
    found = [figures(result, mode, tensor)[figure] for tensor in (None, *tensors(result))]
    values = np.array(found, dtype=np.float64)
    return np.where(values > 0, np.clip(values, 1e-37, 1e37), values)


def worst(result: Result, mode: str) -> str | None:
    """Return the parameter tensor with the largest error to noise; None where none has one."""
    names = [tensor["name"] for tensor in result["tensors"] if tensor["kind"] == "parameter"]
    found = {name: figures(result, mode, name)["error_to_noise"] for name in names}
    known = {name: error for name, error in found.items() if error is not None}
    return max(known, key=lambda name: known[name]) if known else None


def predicted(result: Result, what: str) -> Floats:
    """Return the share `what` ("flushed", "subnormal", "overflowed") predicted in fp16, shape (tensors, scales)."""
    rows = [result["scales"]["predicted"][name][what] for name in tensors(result)]
    return np.array(rows, dtype=np.float64)


def heat(result: Result) -> Floats:
    """Return a colour between -1 and 1 for each tensor and scale, shape (tensors, scales).

    Below 0: nothing overflows, and -1 is all flushed. Above 0: from 0.5 on something overflows, and 1 is all. Both go
    with the logarithm of the share, from `FAINTEST` on. What overflows wins, since one such element costs the step.
    """
    flushed, overflowed = predicted(result, "flushed"), predicted(result, "overflowed")
    cold = np.where(flushed > 0, -_depth(flushed), 0.0)
    return np.where(overflowed > 0, 0.5 + _depth(overflowed) / 2, cold)


def _depth(share: Floats) -> Floats:
    depth: Floats = 1 - np.log10(np.maximum(share, FAINTEST)) / np.log10(FAINTEST)
    return np.maximum(depth, 0.02)


def short(name: str, limit: int = 28) -> str:
    """Return `name` without its middle where it is long: layers differ at the beginning, their tensors at the end."""
    if len(name) <= limit:
        return name
    start = (limit - 1) // 2
    return f"{name[:start]}…{name[start + 1 - limit :]}"


def scaling(result: Result) -> dict[float, list[str]]:
    """Return the modes of each loss scale other than 1, by its log2, as far as the predicted scales go."""
    ks = result["scales"]["k"]
    found: dict[float, list[str]] = {}
    for name, mode in result["modes"].items():
        exponent = float(np.log2(mode["loss_scale"] or 1.0))
        if exponent != 0 and ks[0] <= exponent <= ks[-1]:
            found.setdefault(exponent, []).append(name)
    return found
