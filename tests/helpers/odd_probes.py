"""Results of a probe that are not as one hopes: nothing known, names that mean harm, one tensor, forty."""

import copy
from collections.abc import Callable
from typing import Any

from samples import sample


def nothing_known() -> dict[str, Any]:
    """Null wherever a result may have it."""
    result = copy.deepcopy(sample())
    for mode in result["modes"].values():
        for figures in (mode["total"], *mode["tensors"].values()):
            figures.update(dict.fromkeys(figures))
    for measured in result["scales"]["measured"]:
        for shares in measured["tensors"].values():
            shares.update(dict.fromkeys(shares))
    for tensor in result["tensors"]:
        tensor.update(dict.fromkeys(("gradient", "noise", "noise_error")))
    return result | {"window": None, "scale": None, "clip": None, "total": dict.fromkeys(result["total"])}


def renamed(change: Callable[[str], str]) -> dict[str, Any]:
    """Every text in it changed, and every name of a mode or tensor."""
    result = copy.deepcopy(sample())
    names = {*result["modes"], *(tensor["name"] for tensor in result["tensors"])}

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {change(k) if k in names else k: walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return change(value) if isinstance(value, str) and value != "parameter" and value != "boundary" else value

    changed: dict[str, Any] = walk(result)
    return changed


def of_tensors(count: int) -> dict[str, Any]:
    """As many tensors, with names as long as a Transformer's."""
    result = copy.deepcopy(sample())
    (first, *_) = result["tensors"]
    names = [f"rnn.layers.{i}.self_attn.in_proj_weight" for i in range(count)]
    result["tensors"] = [first | {"name": name} for name in names]
    for mode in result["modes"].values():
        mode["tensors"] = dict.fromkeys(names, mode["tensors"][first["name"]])
    predicted = list(result["scales"]["predicted"].values())
    result["scales"]["predicted"] = {name: predicted[i % len(predicted)] for i, name in enumerate(names)}
    for measured in result["scales"]["measured"]:
        measured["tensors"] = dict.fromkeys(names, measured["tensors"][first["name"]])
    return result


def empty() -> dict[str, Any]:
    """No mode was probed, and there is nothing to say."""
    result = copy.deepcopy(sample()) | {"modes": {}, "advice": [], "covers": []}
    result["scales"]["measured"] = []
    return result


def extreme() -> dict[str, Any]:
    """The largest and the smallest numbers that a file can hold, and one scale only."""
    result = copy.deepcopy(sample())
    for mode, number in zip(result["modes"].values(), (1.7e308, 5e-324, 0.0, 1, 1e-300), strict=True):
        mode["loss_scale"] = number
        for figures in (mode["total"], *mode["tensors"].values()):
            figures |= dict.fromkeys(("error_to_noise", "error_to_noise_error", "bias", "bias_error"), number)
    scales = result["scales"]
    scales |= {"k": [7], "measured": scales["measured"][1:2]}
    scales["predicted"] = {
        name: {what: shares[15:16] for what, shares in table.items()} for name, table in scales["predicted"].items()
    }
    return result | {"window": {"low": -999, "high": 999}, "scale": 999}
