"""What runs are called: by their mode, by a name that was given to them, or by what tells them apart."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from roundoff.errors import printable
from roundoff.runs.reading import Run
from roundoff.verdict.differences import DATA, MISSING, NO_SETTING, PAIRED, canonical

MOST_FIELDS = 3
"""The most fields of one kind in a label."""

ENVIRONMENT = (*PAIRED, "device", "torch", "cudnn", "threads", "git_commit")
"""What of a run's environment a label may tell, in this order."""


def named(runs: Sequence[Run] | Mapping[str, Run | Sequence[Run]]) -> Sequence[Run]:
    """Return `runs` as a sequence; those of a mapping are called by its keys."""
    if not isinstance(runs, Mapping):
        return runs
    groups = {name: [found] if isinstance(found, Run) else found for name, found in runs.items()}
    return [replace(run, label=name, named=True) for name, group in groups.items() for run in group]


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """Return `runs`, in the same order, with a label of its own for each mode that they can be told apart into.

    Those of one mode at several loss scales are called by these. Where two runs of a mode still have one seed, all of
    that mode are called by the fields in which two such runs differ: those of the job, else settings of the precision,
    else the environment, else a part of the path. A run that has a name keeps it.
    """
    found = _with_loss_scales(runs)
    for label in dict.fromkeys(run.label for run in found if not run.named):
        at = [i for i, run in enumerate(found) if run.label == label]
        group = [found[i] for i in at]
        if _apart(group, [""] * len(group)) or any(run.named for run in group):
            continue
        for i, said in zip(at, _what_differs(group) or _folders(group) or [], strict=False):
            found[i] = replace(found[i], label=f"{label} {said}".strip(), named=True)
    return found


def _with_loss_scales(runs: Sequence[Run]) -> list[Run]:
    """Return `runs` with the loss scale in the label of a mode that ran at several.

    Where a run does not say its scale, and a rule moved it, a rule may have moved that of the mode's other runs too.
    """
    scales: dict[str, set[float | None]] = {}
    unnamed = [run for run in runs if not run.named]
    for run in unnamed:
        scales.setdefault(run.label, set()).add(run.loss_scale)
    moved = {run.label for run in unnamed if run.loss_scale is None and not run.says_loss_scale}
    several = {label for label, found in scales.items() if len(found) > 1 and label not in moved}
    return [
        replace(run, label=_label_with_scale(run)) if run.label in several and not run.named else run for run in runs
    ]


def _label_with_scale(run: Run) -> str:
    scale = run.loss_scale
    if scale is None:
        return f"{run.label}-dynamic"
    mantissa, exponent = math.frexp(scale)
    as_power = mantissa == 0.5 and not 1 <= scale <= 2**16
    return f"{run.label}-scale-{f'2^{exponent - 1}' if as_power else f'{scale:.9g}'}"


def _apart(runs: Sequence[Run], texts: Sequence[str]) -> bool:
    """Return whether no two of `runs` have both seed and text in common."""
    return len({(run.seed, text) for run, text in zip(runs, texts, strict=True)}) == len(runs)


def _what_differs(runs: Sequence[Run]) -> list[str] | None:
    """Return a text for each of `runs`, such as "lr=5", that tells those of one seed apart; None if no field does."""
    chosen: list[str] = [""] * len(runs)
    for part in (_job, _settings, _environment):
        fields = [part(run) for run in runs]
        names = [name for name in dict.fromkeys(n for each in fields for n in each) if _differs(runs, fields, name)]
        for name in names[:MOST_FIELDS]:
            chosen = [f"{said} {_said(name, each)}".strip() for said, each in zip(chosen, fields, strict=True)]
        if _apart(runs, chosen):
            return chosen
    return None


def _differs(runs: Sequence[Run], fields: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Return whether the field `name` differs between two of `runs` with one seed."""
    values = {(run.seed, canonical(each.get(name, MISSING))) for run, each in zip(runs, fields, strict=True)}
    return len(values) > len({run.seed for run in runs})


def _said(name: str, fields: Mapping[str, Any]) -> str:
    value = fields.get(name, MISSING)
    short = printable("commit" if name == "git_commit" else name.rpartition(".")[2], 22)
    if value is MISSING:
        return f"no {short}"
    return f"{short}={printable(value if isinstance(value, str) else canonical(value), 22)}"


def _job(run: Run) -> dict[str, Any]:
    return dict(_leaves({name: value for name, value in run.job.items() if name not in DATA}, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{path}.{name}" if path else str(name))


def _settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.config["precision"].items() if name not in NO_SETTING}


def _environment(run: Run) -> dict[str, Any]:
    environment = {name: run.config["environment"].get(name, PAIRED.get(name, MISSING)) for name in ENVIRONMENT}
    return {name: value for name, value in environment.items() if value is not MISSING}


def _folders(runs: Sequence[Run]) -> list[str] | None:
    """Return for each of `runs` the part of its path that tells those of one seed apart; None if no part does.

    Of several such parts, it is the one with the fewest names, which leaves seeds together: "before" of before/fp32-1.
    """
    parts = [run.path.parts[::-1] for run in runs]
    columns = [[part[i] if i < len(part) else "" for part in parts] for i in range(max(map(len, parts)))]
    telling = [[printable(name, 40) for name in names] for names in columns if _apart(runs, names)]
    return min(telling, key=lambda names: len(set(names)), default=None)
