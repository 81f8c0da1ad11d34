"""What runs do not have in common though they are to be compared: fields of the job, settings, unit and seeds."""

import json
import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

from roundoff.errors import printable
from roundoff.runs.json_text import to_json
from roundoff.runs.reading import Run
from roundoff.verdict.types import Failure

MOST_DIFFERENCES = 20

NO_SETTING = ("mode", "dtypes", "equals", "loss_scale")
"""Fields of a run's precision that no user sets, or that tell modes apart already."""

MISSING = object()

DATA = ("corpus", "data")
"""Fields of a job that say on what it trains. Losses on other data cannot be compared."""

PAIRED = {"processes": MISSING, "tf32": MISSING, "deterministic": MISSING, "accumulate": 1}
"""Fields of a run's environment that must be equal where its steps are to be paired with another's.

Each with what a run that does not say it has; a run that may have anything is not asked.
"""


def all_differences(modes: dict[str, list[Run]], failures: dict[str, list[Failure]]) -> list[str]:
    """Return a line for each thing in which the runs of `modes` differ though they are to be compared."""
    runs = _runs(modes)
    found = unit_differences(runs) + job_differences(runs) + setting_differences(modes)
    return found + seed_differences(modes, failures)


def refused_differences(modes: dict[str, list[Run]], failures: dict[str, list[Failure]]) -> list[str]:
    """Return those of `all_differences` that no name says to be meant.

    A mode with a named run may differ from all others in its job and its settings, but for the data, the unit and the
    seeds. Within each, and between those without a name, runs must agree.
    """
    named = {label for label, runs in modes.items() if any(run.named for run in runs)}
    groups = [{label: modes[label]} for label in modes if label in named]
    groups.append({label: modes[label] for label in modes if label not in named})
    runs = _runs(modes)
    found = unit_differences(runs) + job_differences(runs, DATA)
    for group in groups:
        found += job_differences(_runs(group)) + setting_differences(group)
    return list(dict.fromkeys(found + seed_differences(modes, failures)))


def _runs(modes: dict[str, list[Run]]) -> list[Run]:
    return [run for runs in modes.values() for run in runs]


def job_differences(runs: Sequence[Run], fields: Container[str] | None = None) -> list[str]:
    """Return a line for each field of the job that differs between the runs, with its values and their runs.

    With `fields`, of these alone.
    """
    jobs = [(run, {name: v for name, v in run.job.items() if fields is None or name in fields}) for run in runs]
    found = list(_field_differences(jobs, ""))
    more = len(found) - MOST_DIFFERENCES
    return found if more <= 0 else [*found[:MOST_DIFFERENCES], f"{more} more fields of the job differ"]


def _field_differences(values: Sequence[tuple[Run, Any]], path: str) -> Iterator[str]:
    if all(isinstance(value, dict) for _, value in values):
        for name in dict.fromkeys(name for _, value in values for name in value):
            fields = [(run, value.get(name, MISSING)) for run, value in values]
            yield from _field_differences(fields, f"{path}.{name}" if path else str(name))
        return
    groups: dict[str, list[tuple[Run, Any]]] = {}
    for run, value in values:
        groups.setdefault(canonical(value), []).append((run, value))
    if len(groups) > 1:
        shown = [f"{_shown(group[0][1])} in {_names([run for run, _ in group])}" for group in groups.values()]
        yield f"{printable(path, 60)} is {', '.join(shown)}"


def _shown(value: Any) -> str:
    """Return a value of a job as JSON, so that 1 and "1" look different."""
    return "not there" if value is MISSING else printable(to_json(value), 22)


def canonical(value: Any) -> str:
    """Return one text for all values that say the same: 20 and 20.0, nan and "nan"."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if isinstance(value, float):
            return int(value) if value.is_integer() else value if math.isfinite(value) else str(value)
        return value

    return "missing" if value is MISSING else json.dumps(plain(value), sort_keys=True, default=str)


def unit_differences(runs: Sequence[Run]) -> list[str]:
    """Return a line if the losses of the runs are in different units."""
    return list(_field_differences([(run, run.loss_unit or MISSING) for run in runs], "loss_unit"))


def setting_differences(modes: dict[str, list[Run]]) -> list[str]:
    """Return a line for each setting beside the job that differs between runs to be paired, or within one mode.

    The number of processes, and of the parts of a batch, decides what dropout each draws.
    """
    lines: list[str] = []
    for name, otherwise in PAIRED.items():
        values = [(run, run.config["environment"].get(name, otherwise)) for run in _runs(modes)]
        lines += _field_differences([(run, value) for run, value in values if value is not MISSING], name)
    for label, runs in modes.items():
        for name in dict.fromkeys(name for run in runs for name in run.config["precision"]):
            if name not in NO_SETTING:
                settings = [(run, run.config["precision"][name]) for run in runs if name in run.config["precision"]]
                lines += _field_differences(settings, f"{printable(label)}: {name}")
    return lines


def seed_differences(modes: dict[str, list[Run]], failures: dict[str, list[Failure]]) -> list[str]:
    """Return a line if the modes did not run with the same seeds; a run that failed has run."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for label, runs in modes.items():
        seeds = {run.seed for run in runs} | {failure.seed for failure in failures[label]}
        groups.setdefault(tuple(sorted(seeds)), []).append(printable(label))
    if len(groups) < 2:
        return []
    parts = [f"{', '.join(map(str, seeds))} in {', '.join(labels)}" for seeds, labels in groups.items()]
    return [f"seed is {' but '.join(parts)}"]


def _names(runs: list[Run]) -> str:
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return ", ".join(printable(run.path) for run in runs[:3]) + more
