"""Write and read probe.json: all that a probe found, as one JSON object.

Numbers are finite; null stands where there is none.

format          `FORMAT`
environment     as in a run's config.json: torch, python, command and so on
about           a sentence that says what was probed
job             what was probed, by names of the client's own
seed            of all that is drawn
batches         how many
lr, clip        of the update whose stagnation is counted; null for no lr, and for no clipping
flush_limit     the share of a gradient that a loss scale that serves may flush
seconds, peak_memory_bytes
tensors         in forward order: name, kind ("parameter", "boundary"), numel (of one batch), and of the reference's
                gradient: gradient (norm of the mean over batches), noise (standard deviation between batches: the
                root of the summed variances of its elements), noise_error (standard error of that); the last three
                are null for boundaries, whose elements belong to other examples in each batch
total           gradient, noise and noise_error of all parameters together
modes           name -> description, loss_scale, computes (dtype of the products), dtype (of the gradients), weights
                (their dtype), forward (name of an output, such as "loss" -> mean and largest: how far it is from the
                reference's, in its own unit; null where it was not finite), total (`VALUES`) and tensors (name ->
                `VALUES`)
scales          k: exponents of the loss scales 2**k; predicted: tensor -> a share for each k, from the reference's
                gradients alone; measured: some of these scales as run, each with mode, k and tensors (name -> shares)
window          low and high: exponents of the static scales that serve; null where none does
scale           the exponent to take, or null
left_out        name -> reason, of modes that were asked for and could not run
advice, covers  sentences: what to do; what the figures are and what they do not cover
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roundoff.errors import UsageError, printable
from roundoff.runs.jsonfile import read_object, write_json

FORMAT = "roundoff probe 3"
OLD_FORMATS = ("lm-precision probe 1", "roundoff probe 2")
MAX_BYTES = 2**24
"""The most that a probe.json may have: 80 kB for a small model, 200 bytes a tensor, mode and scale."""

SHARES = ("flushed", "subnormal", "overflowed")
"""Shares of the elements that are not 0 in the reference, from 0 to 1."""

VALUES = (
    *("error_to_noise", "error_to_noise_error", "bias", "bias_error", "bias_flushed"),
    *(*SHARES, "stagnated", "critical_batch"),
)
"""The figures of a tensor in a mode.

error_to_noise  root mean square error of the unscaled gradient over the reference's `noise`
bias            norm of the mean error over norm of the mean gradient of the reference; each with its standard error
critical_batch  number of batches in one from which on the bias is larger than the noise; null for a bias like 0
bias_flushed    the bias that the flushed elements alone would make
flushed, subnormal, overflowed
                `SHARES`: became 0; have lost digits; are inf or nan (then the figures above are null)
stagnated       share of the updates that are smaller than half a unit in the last place of a weight in the mode's dtype
"""

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_number(value: Any) -> bool:
    # Digits without end make an int that no float holds.
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_exponent(value: Any) -> bool:
    return type(value) is int and abs(value) < 1000


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_object(value: Any) -> bool:
    return type(value) is dict


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _among(*values: str) -> Check:
    return lambda value: type(value) is str and value in values


def _list(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _map(check: Check) -> Check:
    return lambda value: type(value) is dict and all(map(check, value.values()))


def _fields(**fields: Check) -> Check:
    return lambda value: type(value) is dict and all(name in value and fields[name](value[name]) for name in fields)


_values = _fields(**{name: _or_null(_is_share if name in (*SHARES, "stagnated") else _is_amount) for name in VALUES})
_spread = dict.fromkeys(("gradient", "noise", "noise_error"), _or_null(_is_amount))
_mode = _fields(
    description=_is_text,
    loss_scale=_is_amount,
    computes=_is_text,
    dtype=_is_text,
    weights=_is_text,
    forward=_map(_fields(mean=_or_null(_is_number), largest=_or_null(_is_amount))),
    total=_values,
    tensors=_map(_values),
)
_scales = _fields(
    k=_list(_is_exponent),
    predicted=_map(_fields(**dict.fromkeys(SHARES, _list(_is_share)))),
    measured=_list(
        _fields(mode=_is_text, k=_is_exponent, tensors=_map(_fields(**dict.fromkeys(SHARES, _or_null(_is_share)))))
    ),
)
_RESULT: dict[str, Check] = {
    "environment": _is_object,
    "about": _is_text,
    "job": _is_object,
    "seed": _is_count,
    "batches": _is_count,
    "lr": _or_null(_is_amount),
    "clip": _or_null(_is_amount),
    "flush_limit": _is_amount,
    "seconds": _is_amount,
    "peak_memory_bytes": _is_count,
    "tensors": _list(_fields(name=_is_text, kind=_among("parameter", "boundary"), numel=_is_count, **_spread)),
    "total": _fields(**_spread),
    "modes": _map(_mode),
    "scales": _scales,
    "window": _or_null(_fields(low=_is_exponent, high=_is_exponent)),
    "scale": _or_null(_is_exponent),
    "left_out": _map(_is_text),
    "advice": _list(_is_text),
    "covers": _list(_is_text),
}


def write_probe(path: Path, result: dict[str, Any]) -> None:
    """Write `result`, whose numbers are finite, as `path`.

    Raises:
        OSError: it cannot be written.
    """
    write_json(path, result, indent=1)


def read_probe(path: Path) -> dict[str, Any]:
    """Read what `write_probe` wrote: every field of this module's docstring is there and of its type.

    So every tensor that is named in `modes` or `scales` is one of `tensors`. Every tensor has its `VALUES` in each
    mode. Every list of shares is as long as `scales["k"]`, which counts upwards.

    Raises:
        UsageError: there is no such file, it cannot be read, or its content is something else.
    """
    wanted = "give a probe.json that probe.py wrote"
    try:
        result = read_object(path, MAX_BYTES, wanted)
    except OSError as error:
        raise UsageError(f"{printable(path)}: cannot be read ({error.strerror}); {wanted}") from None
    if result.get("format") in OLD_FORMATS:
        raise UsageError(f"{printable(path)}: an older version wrote this probe; probe again")
    if result.get("format") != FORMAT:
        raise UsageError(f"{printable(path)} is no probe.json of this project; {wanted}")
    for name, check in _RESULT.items():
        if name not in result or not check(result[name]):
            what = "is missing" if name not in result else "is not what probe.py writes there"
            raise UsageError(f"{printable(path)}: field {name} {what}; {wanted}")
    if not _agrees(result):
        raise UsageError(f"{printable(path)}: its fields are not of one probe; {wanted}")
    return result


def _agrees(result: dict[str, Any]) -> bool:
    names, scales = [tensor["name"] for tensor in result["tensors"]], result["scales"]
    ks, shares = scales["k"], scales["predicted"].values()
    window = result["window"]
    return (
        len(set(names)) == len(names) > 0 < len(ks)
        and ks == list(range(ks[0], ks[0] + len(ks)))
        and all(mode["tensors"].keys() == set(names) for mode in result["modes"].values())
        and scales["predicted"].keys() == set(names)
        and all(len(values) == len(ks) for tensor in shares for values in tensor.values())
        and all(one["k"] in ks and one["tensors"].keys() == set(names) for one in scales["measured"])
        and (window is None or window["low"] <= window["high"])
    )
