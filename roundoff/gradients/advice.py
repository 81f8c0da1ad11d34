"""Conclude from a probe's figures: which loss scales serve, and sentences of advice, each with its figure.

Every function reads a result, which is what probe.json holds, and nothing else.
"""

from typing import Any

MARGIN = 4
"""Binades that a static scale keeps below overflow: a factor of 16, for gradients that grow."""


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
    ks = result["scales"]["k"]
    free = [k for k in ks if not any(_shares(result, "overflowed", k).values())]
    if not free:
        return [f"A dynamic loss scale would fall below 2**{ks[0]}, the least that was looked at."]
    top = free[-1]
    flushes = f"where {_most_flushed(result, top)}"
    if top == ks[-1]:
        return [f"A dynamic loss scale would rise to 2**{top} and beyond, {flushes}: nothing overflows there yet."]
    return [
        f"A dynamic loss scale would settle at 2**{top}, the largest without overflow in these batches, {flushes}; "
        f"each try of 2**{top + 1} costs a step."
    ]


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
        if bias is None or error is None or flushed is None or bias < 1e-2:
            continue
        if (bias + error) ** 2 >= 1.5 * bias**2:  # its square is within twice the square's standard error
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
