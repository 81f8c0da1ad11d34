"""Conclude from a probe's figures: which loss scales serve, and sentences of advice, each with its figure.

Every function reads a result, which is what probe.json holds, and nothing else.
"""

from typing import Any

MARGIN = 4
"""Binades that a static scale keeps below overflow: a factor of 16, for gradients that grow."""


NOISE, BIAS = 0.1, 0.05
"""Error to noise and bias from which on a mode is not to be taken; the first adds 1% to the variance of sampling."""


def conclude(result: dict[str, Any]) -> dict[str, Any]:
    """Return the fields `window`, `scale` and `advice` of probe.json, given all figures."""
    return {"window": window(result), "scale": take(result), "advice": advise(result)}


def window(result: dict[str, Any]) -> dict[str, int] | None:
    """Return `low` and `high`, exponents of the static loss scales that serve; None where none does.

    A scale serves if it flushes less than the limit of every tensor, and nothing overflows `MARGIN` binades above it.
    """
    serving = [k for k in result["scales"]["k"] if _is_safe(result, k) and not _blockers(result, k)]
    return {"low": serving[0], "high": serving[-1]} if serving else None


def take(result: dict[str, Any]) -> int | None:
    """Return the exponent of the static loss scale to take; None where every scale is too near to overflow.

    It is the middle of the window, which leaves room for gradients that grow or shrink. Without a window it is the
    largest that keeps its distance from overflow, which flushes least.
    """
    found = window(result)
    if found is not None:
        return (found["low"] + found["high"] + 1) // 2
    return max((k for k in result["scales"]["k"] if _is_safe(result, k)), default=None)


def said(result: dict[str, Any]) -> str:
    """Return what to take of a whole result, in one sentence: which modes do, and which loss scale fp16 needs.

    A mode does if nothing overflows, its error is under `NOISE` of the noise between batches, and its bias under
    `BIAS` of the mean gradient, or not to be told from 0. Modes that compute in fp32 or wider are not looked at.
    """
    narrow = {n: m for n, m in result["modes"].items() if m["computes"] not in ("float32", "float64")}
    reasons = {name: _reason_against(mode) for name, mode in narrow.items()}
    does = [name for name, reason in reasons.items() if reason is None]
    halves = all(mode["computes"] in ("float16", "bfloat16") for mode in narrow.values())
    against: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            against.setdefault(reason, []).append(name)
    parts = []
    if len(does) > 1 and not against:
        parts.append("Any half mode does" if halves else "Any of the modes in fewer bits does")
    elif does:
        parts.append(f"Take {' or '.join(does)}")
    elif narrow:
        parts.append("No mode in fewer bits does as it is")
    parts += [f"{_some(names)}: {reason}" for reason, names in against.items()]
    if any(narrow[name]["computes"] == "bfloat16" for name in does):
        parts.append("bf16 needs no loss scale")
    return "; ".join([*parts, _scale_to_take(result)]) + "."


def _reason_against(mode: dict[str, Any]) -> str | None:
    """Return why not to take a mode, with the figure; None where nothing speaks against it."""
    total = mode["total"]
    error, bias = total["error_to_noise"], total["bias"]
    if total["overflowed"]:
        return f"overflow at a loss scale of {mode['loss_scale']:g}"
    if error is None:
        return "no known error"
    if error >= NOISE:
        return f"an error of {error:.2g} of the noise between batches"
    if bias is not None and bias >= BIAS and _is_sure(bias, total["bias_error"]):
        return f"a bias of {bias:.2g} at a loss scale of {mode['loss_scale']:g}"
    return None


def _is_sure(bias: float, error: float | None) -> bool:
    """Return whether `bias` can be told from 0: its square is beyond twice the standard error of the square."""
    return error is not None and (bias + error) ** 2 < 1.5 * bias**2


def _scale_to_take(result: dict[str, Any]) -> str:
    """Return the loss scale that fp16 needs, such as "fp16: 2^11 static, or dynamic"."""
    best, dynamic = result["scale"], _settles(result)
    flushes = dynamic is not None and bool(_blockers(result, dynamic))
    rises = "dynamic" if dynamic is not None and not flushes else None
    if best is not None and result["window"] is not None:
        return f"fp16: 2^{best} static" + (", or dynamic" if rises else "")
    if rises:
        return "fp16: a dynamic loss scale; no static one keeps its distance from overflow"
    if best is None:
        return "fp16: no loss scale that was looked at serves"
    return (
        f"fp16: no loss scale serves every tensor; 2^{best} static, with {_some(list(_blockers(result, best)))} in fp32"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def advise(result: dict[str, Any]) -> list[str]:
    """Return the sentences, most important first."""
    return [
        *_overflow(result),
        *_static(result),
        *_dynamic(result),
        *_half(result),
        *_bias(result),
        *_stagnation(result),
    ]


def _shares(result: dict[str, Any], share: str, k: int) -> dict[str, float]:
    """Return tensor -> predicted share at the loss scale 2**k."""
    index = k - result["scales"]["k"][0]
    return {name: shares[share][index] for name, shares in result["scales"]["predicted"].items()}


def _is_safe(result: dict[str, Any], k: int) -> bool:
    known = k + MARGIN <= result["scales"]["k"][-1]
    return known and not any(_shares(result, "overflowed", k + MARGIN).values())


def _blockers(result: dict[str, Any], k: int) -> dict[str, float]:
    """Return tensor -> flushed share at 2**k, of the tensors that the limit forbids; the worst first."""
    flushed = {n: s for n, s in _shares(result, "flushed", k).items() if s >= result["flush_limit"]}
    return dict(sorted(flushed.items(), key=lambda item: -item[1]))


def _most_flushed(result: dict[str, Any], k: int) -> str:
    worst, share = max(_shares(result, "flushed", k).items(), key=lambda item: item[1])
    return f"{worst} has most flushed: {share:.2g}" if share else "nothing is flushed (0)"


def _static(result: dict[str, Any]) -> list[str]:
    found, best, limit = window(result), take(result), result["flush_limit"]
    if best is None:
        return [
            f"Every static loss scale from 2**{result['scales']['k'][0]} on comes within a factor of {2**MARGIN} of "
            "fp16's largest number: train in bf16 or fp32."
        ]
    if found is not None:
        several = f"Static loss scales from 2**{found['low']} to 2**{found['high']} flush"
        one = f"No static loss scale but 2**{best} flushes"
        return [
            f"{one if found['low'] == found['high'] else several} less than {limit:g} of every gradient with "
            f"a factor of {2**MARGIN} to overflow; take 2**{best} ({2.0**best:g}), where {_most_flushed(result, best)}."
        ]
    blockers = _blockers(result, best)
    top = result["scales"]["k"][-1] - MARGIN  # beyond which overflow is not known
    scales, largest = ("No single scale serves", "the largest scale that keeps")
    if best == top:
        scales, largest = f"No single scale up to 2**{top} serves, and larger ones were not looked at", "which keeps"
    shown = ", ".join(f"{name} ({share:.2g})" for name, share in list(blockers.items())[:3])
    more = f" and {len(blockers) - 3} more" if len(blockers) > 3 else ""
    return [
        f"{scales}: keep {shown}{more} in fp32. That is the share flushed at 2**{best}, {largest} a factor of "
        f"{2**MARGIN} from overflow; {limit:g} is the limit."
    ]


def _dynamic(result: dict[str, Any]) -> list[str]:
    ks, top = result["scales"]["k"], _settles(result)
    if top is None:
        return [f"A dynamic loss scale would fall below 2**{ks[0]}, the least that was looked at."]
    flushes = f"where {_most_flushed(result, top)}"
    if top == ks[-1]:
        return [f"A dynamic loss scale would rise to 2**{top} and beyond, {flushes}: nothing overflows there yet."]
    return [
        f"A dynamic loss scale would settle at 2**{top}, the largest without overflow in these batches, {flushes}; "
        f"each try of 2**{top + 1} costs a step."
    ]


def _settles(result: dict[str, Any]) -> int | None:
    """Return the exponent of the largest scale without overflow; None where every scale has some."""
    free = [k for k in result["scales"]["k"] if not any(_shares(result, "overflowed", k).values())]
    return free[-1] if free else None


def _of_dtype(result: dict[str, Any], dtype: str, figure: str) -> dict[str, float]:
    """Return mode -> figure of the total, of modes whose products are in `dtype`."""
    return {
        name: mode["total"][figure]
        for name, mode in result["modes"].items()
        if mode["computes"] == dtype and mode["total"][figure] is not None
    }


def _half(result: dict[str, Any]) -> list[str]:
    sentences = []
    noise = {dtype: _of_dtype(result, dtype, "error_to_noise") for dtype in ("float16", "bfloat16")}
    best = {dtype: min(found.items(), key=lambda item: item[1]) for dtype, found in noise.items() if found}
    for name, ratio in best.values():
        sentences.append(
            f"{name}'s error is {ratio:.2g} of the noise between batches: it adds {ratio**2:.2g} to the variance that "
            "sampling has anyway."
        )
    if len(best) == 2 and best["float16"][1] > 0 and best["bfloat16"][1] > 0:
        (fp16, first), (bf16, second) = best["float16"], best["bfloat16"]
        word = "above" if second > first else "not above"
        sentences.append(
            f"bf16's error to noise is {word} fp16's: {second:.2g} in {bf16}, {second / first:.2g} times the "
            f"{first:.2g} of {fp16}."
        )
    return sentences


def _bias(result: dict[str, Any]) -> list[str]:
    sentences = []
    for name, mode in result["modes"].items():
        total = mode["total"]
        bias, error, flushed = total["bias"], total["bias_error"], total["bias_flushed"]
        if bias is None or error is None or flushed is None or bias < 1e-2 or not _is_sure(bias, error):
            continue
        sentences.append(
            f"{name} at a loss scale of {mode['loss_scale']:g} is biased: its mean error is {bias:.2g} +- {error:.1g} "
            f"of the mean gradient, which does not average out; flushed elements alone would make {flushed:.2g}."
        )
    return sentences


def _overflow(result: dict[str, Any]) -> list[str]:
    return [
        f"{name} overflows at its loss scale of {mode['loss_scale']:g}: {mode['total']['overflowed']:.2g} of its "
        "gradient is not finite. It has no error to noise, and training would skip these steps."
        for name, mode in result["modes"].items()
        if mode["total"]["overflowed"]
    ]


def _stagnation(result: dict[str, Any]) -> list[str]:
    found = {dtype: _of_dtype(result, dtype, "stagnated") for dtype in ("float16", "bfloat16")}
    shares = [f"{max(of.values()):.2g} in {dtype}" for dtype, of in found.items() if of]
    if not shares:
        return []
    return [
        f"Without fp32 master weights, updates would be lost to rounding: a share of {' and '.join(shares)} is smaller "
        "than half a unit in the last place of its weight."
    ]
