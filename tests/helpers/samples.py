"""A probe's result with made-up figures, such as probe.py would write it of a small LSTM."""

import math
from typing import Any

from roundoff.gradients.result import FORMAT, SHARES

KS = list(range(-8, 25))
TENSORS = {  # name -> kind, numel, exponent around which its gradients lie
    "encoder.weight": ("parameter", 12_800, -18),
    "embedding": ("boundary", 4_480, -19),
    "rnn.weight_ih_l0": ("parameter", 16_384, -12),
    "rnn.weight_hh_l0": ("parameter", 16_384, -13),
    "rnn.bias_ih_l0": ("parameter", 256, -10),
    "rnn.bias_hh_l0": ("parameter", 256, -10),
    "layer 0": ("boundary", 4_480, -18),
    "rnn.weight_ih_l1": ("parameter", 16_384, -11),
    "rnn.weight_hh_l1": ("parameter", 16_384, -12),
    "rnn.bias_ih_l1": ("parameter", 256, -9),
    "rnn.bias_hh_l1": ("parameter", 256, -9),
    "layer 1": ("boundary", 4_480, -17),
    "decoder.weight": ("parameter", 12_800, -9),
    "decoder.bias": ("parameter", 200, -7),
    "logits": ("boundary", 14_000, -21),
}
MODES = {  # name -> script, loss scale, dtype of the gradients, of the weights, size of the error
    "fp32": ("main.py", 1.0, "float32", "float32", 2e-7),
    "manual": ("main.py", 128.0, "float16", "float16", 1.2e-3),
    "fp16-optimizer-dynamic": ("main_fp16_optimizer.py", 65536.0, "float16", "float16", 1.1e-3),
    "amp-fp16": ("main_amp.py", 65536.0, "float32", "float32", 9e-4),
    "amp-bf16": ("main_amp.py", 1.0, "float32", "float32", 7.3e-3),
}


def below(exponent: float) -> float:
    """The share of a normal distribution of exponents, 3 wide, that is below `exponent`."""
    return round(0.5 * math.erfc(-exponent / (3 * math.sqrt(2))), 9)


def shares(center: int, k: int) -> dict[str, float]:
    """As of fp16 gradients around 2**center, scaled by 2**k."""
    flushed = below(-25 - k - center)
    return {
        "flushed": flushed,
        "subnormal": below(-14 - k - center) - flushed,
        "overflowed": round(1 - below(16 - k - center), 9),
    }


def values(name: str, mode: str) -> dict[str, float | None]:
    """Those of a tensor, or of "total"."""
    kind, _, center = TENSORS.get(name, ("parameter", 0, -12))
    _, scale, _, _, error = MODES[mode]
    fp16 = mode not in ("fp32", "amp-bf16")
    found: dict[str, float | None] = dict.fromkeys(SHARES, 0.0)
    if fp16:
        found |= shares(center, int(math.log2(scale)))
    error *= 1 + (len(name) % 5) / 2
    if kind == "boundary":
        return (
            dict.fromkeys(
                (
                    "error_to_noise",
                    "error_to_noise_error",
                    "bias",
                    "bias_error",
                    "bias_flushed",
                    "stagnated",
                    "critical_batch",
                )
            )
            | found
        )
    return found | {
        "error_to_noise": error,
        "error_to_noise_error": error / 20,
        "bias": error / 4,
        "bias_error": error / 30,
        "bias_flushed": error * (found["flushed"] or 0.0),
        "critical_batch": None if mode == "fp32" else (4 / error) ** 2,
        "stagnated": 1e-6 if mode == "fp32" else 0.86 if mode == "amp-bf16" else 0.31,
    }


def sample() -> dict[str, Any]:
    """A whole result."""
    tensors = [
        {"name": name, "kind": kind, "numel": numel}
        | (
            dict.fromkeys(("gradient", "noise", "noise_error"))
            if kind == "boundary"
            else {"gradient": 0.02 + numel / 1e6, "noise": 0.05 + numel / 5e5, "noise_error": 0.004}
        )
        for name, (kind, numel, _) in TENSORS.items()
    ]
    modes = {
        mode: {
            "description": script,
            "loss_scale": scale,
            "computes": {"fp32": "float32", "amp-bf16": "bfloat16"}.get(mode, "float16"),
            "dtype": dtype,
            "weights": weights,
            "forward": {"loss": {"mean": -1e-4 * scale**-0.5, "largest": 2e-4}},
            "total": values("total", mode),
            "tensors": {name: values(name, mode) for name in TENSORS},
        }
        for mode, (script, scale, dtype, weights, _) in MODES.items()
    }
    predicted = {
        name: {share: [shares(center, k)[share] for k in KS] for share in SHARES}
        for name, (_, _, center) in TENSORS.items()
    }
    measured = [
        {"mode": mode, "k": k, "tensors": {name: shares(center, k) for name, (_, _, center) in TENSORS.items()}}
        for mode, k in (("manual", 0), ("manual", 7), ("fp16-optimizer-dynamic", 16))
    ]
    return {
        "format": FORMAT,
        "environment": {
            "torch": "2.13.0",
            "python": "3.11.9",
            "roundoff": "1.0",
            "git_commit": None,
            "platform": "Linux",
            "threads": 2,
            "command": ["probe.py", "--batches", "32"],
        },
        "about": (
            "LSTM of 2 layers with 64 units and 200 words, fresh weights of seed 1111; "
            "32 batches of 7 x 10 words of corpus."
        ),
        "job": {
            "data": "corpus",
            "model": {"kind": "LSTM", "ntokens": 200, "nhid": 64, "nlayers": 2},
            "weights": {"kind": "fresh", "path": None, "epoch": None, "steps": None},
            "batch_size": 7,
            "bptt": 10,
        },
        "seed": 1111,
        "batches": 32,
        "lr": 20.0,
        "clip": 0.25,
        "flush_limit": 1e-3,
        "seconds": 12.5,
        "peak_memory_bytes": 400_000_000,
        "tensors": tensors,
        "total": {"gradient": 0.11, "noise": 0.31, "noise_error": 0.012},
        "modes": modes,
        "scales": {"k": KS, "predicted": predicted, "measured": measured},
        "left_out": {},
        "window": {"low": 6, "high": 15},
        "scale": 11,
        "advice": [
            "Static loss scales from 2**6 to 2**15 flush less than 0.001 of every gradient and stay a factor of 16 "
            "below overflow; take 2**11.",
            "amp-bf16's error to noise is 8.1 times that of amp-fp16 (0.0073 and 0.0009).",
        ],
        "covers": ["The gradients of 32 batches at one set of weights: errors that add up over steps are not seen."],
    }  # fmt: skip
