"""Make and read `config.json`, which says what a run trains, in which precision, and on what."""

import json
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import roundoff
from roundoff import processes
from roundoff.device import (
    cudnn_version,
    device_name,
    driver_version,
    reduced_precision_reductions_allowed,
    tf32_allowed,
)
from roundoff.errors import UsageError, printable
from roundoff.runs.json_text import to_json
from roundoff.runs.jsonfile import MAX_BYTES, read_object, unwritable
from roundoff.runs.reading import misfit


def versions() -> dict[str, Any]:
    """Return the versions of torch, Python and this library, the system, and the number of threads."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "roundoff": roundoff.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def describe_run(
    job: Mapping[str, Any] | None, precision: Mapping[str, Any], seed: int | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `config.json` of a new run, still without its device.

    What `precision` or `more` has as None is left out: the run does not say it. A loss scale of "dynamic" becomes null.
    """
    said = {name: value for name, value in precision.items() if value is not None}
    if said.get("loss_scale") == "dynamic":
        said["loss_scale"] = None
    environment = versions() | {"command": sys.argv, "processes": processes.world_size()}
    given = {name: value for name, value in more.items() if value is not None}
    job, seed = {} if job is None else job, 0 if seed is None else seed
    return {"job": job, "precision": said, "seed": seed, "environment": environment} | given


def check_config(config: Mapping[str, Any]) -> None:
    """Raise UsageError, which names the field, unless `read_run` takes `config` as `config.json`."""
    precision = config.get("precision")
    fields = dict(precision) if isinstance(precision, Mapping) else {}
    for name, value in (fields | {name: value for name, value in config.items() if name != "precision"}).items():
        if problem := unwritable(value, name):
            raise UsageError(problem)
    text = to_json(config, indent=2)
    if len(text.encode("utf-8", "backslashreplace")) > MAX_BYTES // 2:  # the device is still to come
        raise UsageError(f"job and what else config.json holds takes more than {MAX_BYTES // 2} bytes; give less")
    if problem := misfit("config.json", json.loads(text)):
        raise UsageError(problem)


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """Return what `config.json` says of a device.

    That is its name, and the versions of cuDNN and of its driver (None for a CPU). It is whether fp32 operands may be
    rounded to TF32, and whether half products may be added up in half.
    """
    cuda = str(device).startswith("cuda")
    return {
        "device": device_name(str(device)),
        "cudnn": cudnn_version() if cuda else None,
        "driver": driver_version() if cuda else None,
        "tf32": cuda and tf32_allowed(),
        "reduced_precision_reductions": cuda and reduced_precision_reductions_allowed(),
    }


def guess_device(values: Iterable[object]) -> torch.device | str:
    """Return the device of the first tensor among `values`; without one a CUDA GPU where there is one, else the CPU."""
    found = next((value.device for value in values if isinstance(value, torch.Tensor)), None)
    return found or ("cuda" if torch.cuda.is_available() else "cpu")


def read_config(path: Path, job: Mapping[str, Any] | None, mode: str, seed: int | None, where: str) -> dict[str, Any]:
    """Return `config.json` of the run in `path`, which goes on; errors begin with `where`.

    Raises:
        UsageError: there is none, or the run was started with another job, mode or seed than those given.
    """
    config = read_object(path / "config.json")
    precision = config.get("precision")
    found = {"job": config.get("job"), "seed": config.get("seed")}
    found["mode"] = precision.get("mode") if isinstance(precision, dict) else None
    for name, value in {"job": job, "mode": mode or None, "seed": seed}.items():
        if problem := unwritable(value, name):
            raise UsageError(f"{printable(where)}: {problem}")
        if value is not None and json.loads(to_json(value)) != found[name]:
            raise UsageError(
                f"{printable(where)}: the run was started with {name} {printable(to_json(found[name]))}, "
                f"not {printable(to_json(value))}; give the same, or start a new run"
            )
    if not isinstance(config.get("environment"), dict):
        raise UsageError(f"{printable(where)}: config.json is of no run; give a run directory")
    return config
