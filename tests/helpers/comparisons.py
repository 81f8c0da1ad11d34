"""Comparisons built by hand, for what is drawn of them; `synthetic` writes run directories."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roundoff.runs.reading import Run, perplexity
from roundoff.verdict.types import BitEquality, Comparison, Failure, ModeSummary, Verdict
from synthetic import changed, make_config


def make_run(label: str, seed: int = 1111, losses: Sequence[float] = (6.0, 5.5, 5.25, 5.0), **more: Any) -> Run:
    """A run of two epochs with those losses; `more`: applied, scales, norms, epochs, status, problems, path, config."""
    count = len(losses)
    applied = more.get("applied", [True] * count)
    steps = {
        "step": list(range(1, count + 1)),
        "epoch": [1 if i < (count + 1) // 2 else 2 for i in range(count)],
        "loss": list(losses),
        "grad_norm": more.get("norms", [0.25 if good else math.inf for good in applied]),
        "loss_scale": more.get("scales", [128.0] * count),
        "lr": [20.0] * count,
        "applied": applied,
    }
    rows = [
        {"epoch": i + 1, "valid_loss": loss, "valid_ppl": perplexity(loss), "lr": 20.0, "seconds": 1.0}
        for i, loss in enumerate(more.get("epochs", [5.5, 5.0]))
    ]
    status = more.get("status", "finished")
    result = {"status": status, "test_loss": 5.0, "test_ppl": perplexity(5.0), "steps": count, "skipped": 0}
    config = changed(make_config(label, seed), more.get("config", {}))
    path = more.get("path", Path("runs") / f"{label}-{seed}")
    return Run(path, label, seed, config, steps, rows, result, more.get("problems", []))


def make_comparison(
    runs: Sequence[Run], failures: Sequence[Failure] = (), differences: Sequence[str] = ()
) -> Comparison:
    """Of those runs; the first one's mode is the reference."""
    labels = list(dict.fromkeys([run.label for run in runs] + [failure.label for failure in failures]))
    modes = [
        _summary(i, label, [run for run in runs if run.label == label], [f for f in failures if f.label == label])
        for i, label in enumerate(labels)
    ]
    pairs = [BitEquality(labels[0], label, True, 4, True, f"{labels[0]} = {label}: bit-equal") for label in labels[1:]]
    return Comparison(
        labels[0], 0.01, modes, pairs, ["Covers seeds.", "Not other data."], list(differences), unit="nats a word"
    )


def _summary(place: int, label: str, runs: list[Run], failures: list[Failure]) -> ModeSummary:
    sentence = f"{label} is the reference." if place == 0 else f"{label} is equivalent to the reference."
    verdict = (
        Verdict("reference", sentence, 3) if place == 0 else Verdict("equivalent", sentence, 3, -0.001, (-0.003, 0.001))
    )
    steps = sum(len(run.steps["step"]) for run in runs)
    updates = sum(sum(run.steps["applied"]) for run in runs)
    return ModeSummary(
        label=label,
        runs=runs,
        failures=failures,
        status="finished" if runs else "failed",
        test_loss=5.0 if runs else None,
        test_ppl=perplexity(5.0) if runs else None,
        verdict=verdict,
        first_difference=None if place == 0 else 3,
        steps=steps,
        updates=updates,
        skipped=steps - updates,
        final_loss_scale=128.0 if runs else None,
        tokens_per_second=1000.0 if runs else None,
        peak_memory_bytes=2**28 if runs else None,
    )
