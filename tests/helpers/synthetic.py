"""Run directories with known figures, as the trainers would have written them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.options.modes import MODES, Mode
from roundoff.runs.json_text import to_json
from roundoff.runs.reading import perplexity

SEEDS = (1111, 1112, 1113, 1114, 1115)
LOSSES = [6.5, 6.25, 6.0, 5.75, 5.5, 5.25, 5.0, 4.75]
"""Training losses that fp32 and fp16 both hold exactly."""

_SCALES = {"manual": 128.0, "fp16-optimizer": 128.0, "fp16-optimizer-dynamic": None, "amp-fp16": None}


def make_run(
    folder: Path,
    label: str = "fp32",
    seed: int = 1111,
    losses: Sequence[float] | None = None,
    test_loss: float | None = 5.5,
    loss_scales: Sequence[float] | None = None,
    applied: Sequence[bool] | None = None,
    status: str | None = "finished",
    grad_norms: Sequence[float] | None = None,
    steps_per_epoch: int | None = None,
    valid_losses: Sequence[float] | None = None,
    tokens_per_second: float | None = 1000.0,
    peak_memory_bytes: int | None = 400_000_000,
    **changes: Any,
) -> Path:
    """Write the run directory `folder` (with its parents) and return it.

    Args:
        folder: the run directory itself; must not exist yet.
        label: one of `lm.options.modes.MODES`, or another mode, which equals none and trains in fp32.
        seed: of the run.
        losses: training loss a step; by default `LOSSES`.
        test_loss: in the result; None as of a run that diverged.
        loss_scales: one a step; by default the static loss scale, or 65536 where it is dynamic.
        applied: one a step; by default all True.
        status: in the result; None for a run that has not ended, and so has no result.json.
        grad_norms: one a step; by default 0.25, or inf where the step was skipped.
        steps_per_epoch: by default half of the steps, so that there are two epochs.
        valid_losses: one an epoch that was completed; by default the mean loss of its steps.
        tokens_per_second, peak_memory_bytes: in the result.
        changes: to config.json; a mapping changes the fields that it names, such as `job={"bptt": 70}`.
    """
    losses = LOSSES if losses is None else losses
    base = changed(make_config(label, seed), changes)
    static = base["precision"]["loss_scale"]
    scales = [65536.0 if static is None else static] * len(losses) if loss_scales is None else loss_scales
    taken = [True] * len(losses) if applied is None else applied
    norms = [0.25 if good else math.inf for good in taken] if grad_norms is None else grad_norms
    per_epoch = steps_per_epoch or max(1, len(losses) // 2)
    rows = [
        {
            "step": i + 1,
            "epoch": i // per_epoch + 1,
            "loss": losses[i],
            "grad_norm": norms[i],
            "loss_scale": scales[i],
            "applied": taken[i],
            "lr": base["job"]["lr"],
        }
        for i in range(len(losses))
    ]
    if valid_losses is None:
        starts = range(0, len(losses) - per_epoch + 1, per_epoch)
        valid_losses = [sum(losses[i : i + per_epoch]) / per_epoch for i in starts]
    epochs = [
        {"epoch": i + 1, "valid_loss": loss, "valid_ppl": perplexity(loss), "lr": base["job"]["lr"], "seconds": 1.5}
        for i, loss in enumerate(valid_losses)
    ]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", base)
    write_rows(folder / "steps.jsonl", rows)
    write_rows(folder / "epochs.jsonl", epochs)
    if status is not None:
        result = {
            "status": status,
            "test_loss": test_loss,
            "test_ppl": None if test_loss is None else perplexity(test_loss),
            "steps": len(rows),
            "skipped": sum(not good for good in taken),
            "tokens_per_second": tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes,
        }
        write_json(folder / "result.json", result)
    return folder


def ending(loss: float) -> list[float]:
    """`LOSSES`, but for the second half of the steps, which verdicts compare."""
    return [*LOSSES[:4], *[loss] * 4]


def make_runs(
    parent: Path, label: str, test_losses: Sequence[float | None], losses: Sequence[float] | None = None, **rest: Any
) -> list[Path]:
    """A run of `SEEDS[i]` with `test_losses[i]` in `parent / f"{label}-{seed}"` for each i; `rest` as `make_run`."""
    return [
        make_run(parent / f"{label}-{seed}", label, seed, losses, test_loss, **rest)
        for seed, test_loss in zip(SEEDS, test_losses, strict=False)
    ]


def make_config(label: str = "fp32", seed: int = 1111) -> dict[str, Any]:
    """`config.json` of a mode, as the trainers write it."""
    mode = MODES.get(label, Mode(label, "other", {}, "float32"))
    wide = "float32" if mode.script == "main_amp" else mode.dtype
    return {
        "job": {
            "corpus": {
                "name": "corpus",
                "sha256": {"train": "aa" * 32, "valid": "bb" * 32, "test": "cc" * 32},
                "train_tokens": 5600,
                "valid_tokens": 560,
                "test_tokens": 560,
                "words": 2186,
                "vocab_size": 2192,
            },
            "model": "LSTM",
            "emsize": 8,
            "nhid": 8,
            "nlayers": 2,
            "nhead": 2,
            "dropout": 0.2,
            "tied": False,
            "batch_size": 20,
            "bptt": 35,
            "optimizer": "sgd",
            "lr": 20.0,
            "clip": 0.25,
            "epochs": 2,
            "max_steps": None,
            "dry_run": False,
        },
        "precision": {
            "mode": label,
            "dtype": mode.dtype,
            "loss_scale": _SCALES.get(label, 1.0),
            "dtypes": {
                "weights": wide,
                "master_weights": "float32",
                "hidden": mode.dtype,
                "logits": mode.dtype,
                "loss": "float32",
                "gradients": wide,
            },
            "equals": list(mode.equals),
        },
        "seed": seed,
        "environment": {
            "torch": "2.13.0+cpu",
            "python": "3.11.7",
            "roundoff": "0.1.0",
            "git_commit": None,
            "platform": "Linux-x86_64",
            "threads": 2,
            "command": [f"{mode.script}.py", "--seed", str(seed)],
            "device": "A CPU x 2",
            "processes": 1,
            "tf32": False,
        },
        "options": {
            "script": mode.script,
            "data": "corpus",
            "fp16": "fp16" in mode.options,
            "save": "model.safetensors",
        },
        "parameters": 38416,
    }


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`content` with `changes`; where both hold a mapping, its fields are changed."""
    both = {k: v for k, v in changes.items() if isinstance(v, dict) and isinstance(content.get(k), dict)}
    return content | changes | {name: changed(content[name], change) for name, change in both.items()}


def write_json(path: Path, content: Any) -> None:
    """Write `content` as the trainers write a .json file."""
    path.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` as the trainers write a .jsonl file."""
    path.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")


def change_json(path: Path, **fields: Any) -> None:
    """Replace fields of a .json file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | fields)
