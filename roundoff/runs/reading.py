"""Reads run directories. One may be unfinished, damaged, or made to do harm, and comes from any training loop.

`config.json` must have a job, a precision with a mode, a seed and an environment. All names in a run are data.
"""

import gc
import itertools
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from roundoff.errors import UsageError, printable
from roundoff.runs.jsonfile import RUN_DIRECTORY, read_object, reason, require_file

MAX_LINE_BYTES = 2**16
"""The longest line of steps.jsonl or epochs.jsonl. A row has some hundred bytes."""

CHUNK_BYTES = 2**18
"""How much of a file is read at a time: some 2,000 rows."""

MOST_LOSSES = 16
"""The most further losses that a run may name. Each is a column, so a file of many names would take much memory."""

OLD_TRAINERS: dict[str, Any] = {"loss_unit": "nats a word", "length": ["epochs", "max_steps", "dry_run"]}
"""What config.json of this project's trainers did not say at first. They have `options` with a `script`."""

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127

STATUSES = ("finished", "interrupted", "diverged")


@dataclass(frozen=True)
class Run:
    """One run directory, as far as it goes.

    Attributes:
        path: the directory.
        label: the name of its mode, such as "amp-fp16".
        seed: the seed.
        config: `config.json`.
        steps: `steps.jsonl` as columns of equal length: "step", "epoch" (int), "loss", "grad_norm", "loss_scale",
            "lr" (float, which may be inf or nan), "applied" (bool).
        epochs: the rows of `epochs.jsonl`; "valid_ppl" is exp(valid_loss) where the loss is in nats a word and the run
            did not say, and is absent where there is none.
        result: `result.json`; None for a run that has not ended.
        problems: what was wrong with the files and could be passed over, a line each.
        losses: further losses of the steps by name, each a column as long as those of `steps`, with nan where a step
            has none.
        named: `label` is a name that somebody gave to the run, or that tells it apart from others of its mode.
    """

    path: Path
    label: str
    seed: int
    config: dict[str, Any]
    steps: dict[str, list[Any]]
    epochs: list[dict[str, Any]]
    result: dict[str, Any] | None
    problems: list[str] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    named: bool = False

    @property
    def status(self) -> str:
        """Return the status in the result: "finished", "interrupted" or "diverged"; "unfinished" without a result."""
        return "unfinished" if self.result is None else str(self.result["status"])

    @property
    def job(self) -> dict[str, Any]:
        """Return what must be equal for two runs to be compared."""
        job: dict[str, Any] = self.config["job"]
        return job

    @property
    def test_loss(self) -> float | None:
        """Return the loss on the test data; None where the run has none, or has not ended."""
        loss: float | None = None if self.result is None else self.result["test_loss"]
        return loss

    @property
    def loss_unit(self) -> str | None:
        """Return the unit of the losses, such as "nats a word"; None where the run says none."""
        unit: str | None = self._said("loss_unit")
        return unit or None

    @property
    def length(self) -> list[str]:
        """Return the fields of the job that say how long training goes, and change no step."""
        return self._said("length") or []

    def _said(self, name: str) -> Any:
        options = self.config.get("options")
        old = isinstance(options, dict) and "script" in options
        return self.config.get(name, OLD_TRAINERS[name] if old else None)

    @property
    def loss_scale(self) -> float | None:
        """Return the static loss scale; None where a rule moves it.

        A run that does not say has the scale of its steps, if that never changed.
        """
        if self.says_loss_scale:
            scale: float | None = self.config["precision"]["loss_scale"]
            return scale
        used = set(self.steps["loss_scale"])
        return used.pop() if len(used) == 1 else None

    @property
    def says_loss_scale(self) -> bool:
        """Return whether the run says its loss scale; null says that a rule moves it."""
        return "loss_scale" in self.config["precision"]

    @property
    def dtype(self) -> str | None:
        """Return the dtype of the products, such as "float16"; None where the run does not say."""
        dtype: str | None = self.config["precision"].get("dtype")
        return dtype

    @property
    def equals(self) -> list[str]:
        """Return the modes whose losses this mode must equal to the bit."""
        return self.config["precision"].get("equals") or []

    @property
    def device(self) -> str:
        """Return the name of the device."""
        return str(self.config["environment"].get("device", "a device without a name"))


class _MismatchError(Exception):
    """A value is not what its field takes. The text says what the field takes."""


_SPELT = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:  # a bool is an int to isinstance
        raise _MismatchError("a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is str and value in _SPELT:
        return _SPELT[value]
    raise _MismatchError('a number, "inf", "-inf" or "nan"')


def _loss(value: Any) -> float:
    """Return a number that float32 can hold: a figure would overflow at a larger one."""
    number = _number(value)
    if math.isfinite(number) and abs(number) > LARGEST_FLOAT32:
        raise _MismatchError("a number that a float32 can hold")
    return number


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _MismatchError("true or false")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _MismatchError("a text")
    return value


def _texts(value: Any) -> list[str]:
    if type(value) is not list or any(type(text) is not str for text in value):
        raise _MismatchError("a list of texts")
    return value


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _MismatchError("an object")
    return value


def _losses(value: Any) -> dict[str, float] | None:
    if value is not None and len(_object(value)) > MOST_LOSSES:
        raise _MismatchError(f"an object of at most {MOST_LOSSES} losses")
    return None if value is None else {name: _loss(loss) for name, loss in value.items()}


def _status(value: Any) -> str:
    if value not in STATUSES:
        raise _MismatchError(" or ".join(f'"{status}"' for status in STATUSES))
    return str(value)


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except _MismatchError as error:
            raise _MismatchError(f"{error}, or null") from None

    return checked


Fields = dict[str, Callable[[Any], Any]]

_CONFIG: Fields = {"job": _object, "precision": _object, "seed": _integer, "environment": _object}
_SAID: Fields = {"loss_unit": _optional(_text), "length": _optional(_texts)}
_PRECISION: Fields = {
    "mode": _text,
    "loss_scale": _optional(_number),
    "dtype": _optional(_text),
    "equals": _optional(_texts),
}
_STEP: Fields = {
    "step": _integer,
    "epoch": _integer,
    "loss": _loss,
    "grad_norm": _loss,
    "loss_scale": _loss,
    "applied": _flag,
    "lr": _number,
    "losses": _losses,
}
_EPOCH: Fields = {
    "epoch": _integer,
    "valid_loss": _loss,
    "valid_ppl": _optional(_number),
    "lr": _number,
    "seconds": _number,
}
_RESULT: Fields = {
    "status": _status,
    "test_loss": _optional(_loss),
    "test_ppl": _optional(_number),
    "steps": _integer,
    "skipped": _integer,
    "tokens_per_second": _optional(_number),
    "peak_memory_bytes": _optional(_integer),
}


def misfit(file: str, content: Mapping[str, Any]) -> str | None:
    """Return a sentence on the first field of `content` that a reader would refuse; None where it takes all of them.

    Args:
        file: "config.json", "epochs.jsonl" or "result.json", which `content` (of an epoch, a row) is to be written to.
        content: as JSON gives it back.
    """
    parts: dict[str, list[tuple[Any, Fields]]] = {
        "config.json": [(content, _CONFIG | _SAID), (content.get("precision"), _PRECISION)],
        "epochs.jsonl": [(content, _EPOCH)],
        "result.json": [(content, _RESULT)],
    }
    for part, fields in parts[file]:
        for name, check in fields.items():
            value = part.get(name)
            try:
                check(value)
            except _MismatchError as error:
                return f"{name} is {printable(reprlib.repr(value))}, where {error} belongs"
    return None


def read_run(path: Path | str) -> Run:
    """Read the run directory `path`, as far as the run went.

    `Run.problems` notes what a stopped program leaves: a last line that was cut, no epochs.jsonl, steps that are
    missing, repeated or out of order. The last row of a repeated step counts. Steps are sorted. A line that is
    broken elsewhere is refused: no program stops that way. Unknown fields are ignored.

    Raises:
        UsageError: the directory, its config.json or steps.jsonl is missing or cannot be read, a field is missing
            or has another type, or the run has no steps.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            what = "this is no directory" if path.exists() else "there is no such directory"
            raise UsageError(f"{printable(path)}: {what}; {RUN_DIRECTORY}")
        return _read(path)
    except OSError as error:
        raise UsageError(f"{printable(error.filename or path)}: cannot be read ({error.strerror})") from None


def _read(path: Path) -> Run:
    problems: list[str] = []
    config = _read_config(path / "config.json")
    steps = _read_rows(path / "steps.jsonl", _STEP, problems)
    losses = _by_name(path / "steps.jsonl", steps.pop("losses"))
    if not steps["step"]:
        raise UsageError(f"{printable(path)} is a run of no steps: there is nothing to compare; let it train longer")
    epochs = _EMPTY_EPOCHS
    if (path / "epochs.jsonl").exists():
        epochs = _read_rows(path / "epochs.jsonl", _EPOCH, problems)
    else:
        problems.append("epochs.jsonl is missing")
    result = None
    if (path / "result.json").exists():
        result = _checked(path / "result.json", read_object(path / "result.json"), _RESULT)
        if result["steps"] != len(steps["step"]):
            problems.append(f"result.json counts {result['steps']} steps, steps.jsonl has {len(steps['step'])}")
    rows = [dict(zip(epochs, row, strict=True)) for row in zip(*epochs.values(), strict=True)]
    run = Run(path, config["precision"]["mode"], config["seed"], config, steps, rows, result, problems, losses)
    for row in rows:
        if row["valid_ppl"] is None:
            del row["valid_ppl"]
            if has_perplexity(run.loss_unit):
                row |= {"valid_ppl": perplexity(row["valid_loss"])}
    return run


_EMPTY_EPOCHS: dict[str, list[Any]] = {name: [] for name in _EPOCH}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    if "job" not in config:
        raise UsageError(
            f"{printable(path)}: field job is missing: an older version wrote this run, or another program; "
            "train it again to compare it"
        )
    checked = _checked(path, config, _CONFIG)
    _checked(path, config, _SAID)
    said = _checked(path, checked["precision"], _PRECISION, "precision.")
    checked["precision"] |= {name: value for name, value in said.items() if name in checked["precision"]}
    return config | checked


def _checked(path: Path | str, content: dict[str, Any], fields: Fields, prefix: str = "") -> dict[str, Any]:
    """Return the `fields` of `content`, each converted by its check. A field that may be null may be missing."""
    checked = {}
    for name, check in fields.items():
        try:
            checked[name] = check(content.get(name))
        except _MismatchError as error:
            given = f"is {reprlib.repr(content[name])}" if name in content else "is missing"
            raise UsageError(f"{printable(path)}: field {prefix}{name} {given}, where {error} belongs") from None
    return checked


def _read_rows(path: Path, fields: Fields, problems: list[str]) -> dict[str, list[Any]]:
    """Return a .jsonl file as columns, in ascending order of the first of `fields`.

    It is read piece by piece, and other fields are dropped: the columns take a few times the file's size at most. A
    piece in which anything is odd is read again line by line, which finds the line and says what is wrong with it.
    """
    require_file(path)
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    number = 0
    with path.open("rb") as file, _without_garbage_collection():
        while chunk := _whole_lines(file):
            found = _columns(chunk, fields)
            if found is None:
                file.seek(-len(chunk), 1)
                end = file.tell() + len(chunk)
                for row in _rows(path, file, number, end, problems):
                    number += 1
                    for name, value in _checked(f"{path}, line {number}", row, fields).items():
                        columns[name].append(value)
                continue
            number += chunk.count(b"\n")
            for name, values in found.items():
                columns[name] += values
    return _in_order(path.name, columns, next(iter(fields)), problems)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Let nobody look for circles meanwhile: JSON has none, and a million rows are looked through again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _whole_lines(file: IO[bytes]) -> bytes:
    """Return the next lines of `file`, about `CHUNK_BYTES`; of a last or a longer line, a part. b"" at the end."""
    chunk = file.read(CHUNK_BYTES)
    end = chunk.rfind(b"\n") + 1
    if 0 < end < len(chunk):
        file.seek(end - len(chunk), 1)
        return chunk[:end]
    return chunk


def _rows(path: Path, file: IO[bytes], number: int, end: int, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the lines up to the place `end` of `file`, the first of which follows line `number`."""
    while file.tell() < end:
        line = file.readline(MAX_LINE_BYTES + 1)
        number += 1
        where = f"{printable(path)}: line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"{where} has more than {MAX_LINE_BYTES} bytes; no run has such a row")
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if not file.read(1):
                problems.append(f"the last line of {path.name} is cut off, and is passed over")
                return
            raise UsageError(f"{where} cannot be read as JSON ({reason(error)}); leave this run out") from None
        if type(row) is not dict:
            raise UsageError(f"{where} is {reprlib.repr(row)}, where an object belongs")
        yield row


_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def _columns(chunk: bytes, fields: Fields) -> dict[str, list[Any]] | None:
    """Return the columns of lines that are as a program writes them; None where a closer look is needed."""
    if not chunk.endswith(b"\n"):
        return None
    rows, at = [], 0
    try:
        text = chunk.decode()
        while at < len(text):
            row, end = _scan(text, at)
            if text[end] != "\n" or type(row) is not dict or end - at > MAX_LINE_BYTES // 4:  # a letter has 4 bytes
                return None
            rows.append(row)
            at = end + 1
        required = [name for name in fields if name in rows[0]]
        columns = dict(zip(required, map(list, zip(*map(itemgetter(*required), rows), strict=True)), strict=True))
        for name in fields.keys() - columns.keys():
            if any(name in row for row in rows):
                return None
            columns[name] = [fields[name](None)] * len(rows)
        return {name: _checked_column(columns[name], check) for name, check in fields.items()}
    except (StopIteration, ValueError, RecursionError, LookupError, TypeError, _MismatchError):
        return None


def _checked_column(values: list[Any], check: Callable[[Any], Any]) -> list[Any]:
    """Return `values`, each as `check` returns it. Equal values share one object, which takes a third of the memory."""
    kinds = set(map(type, values))
    good = (
        (check is _integer and kinds == {int} and 0 <= min(values) <= max(values) < 2**63)
        or (check is _flag and kinds == {bool})
        or (check is _number and kinds == {float})
        or (check is _loss and kinds == {float} and sum(map(abs, values)) <= LARGEST_FLOAT32)  # False with a nan
    )
    found = values if good else [check(value) for value in values]
    first = found[0]
    return [first] * len(found) if first and found.count(first) == len(found) else found  # 0.0 may stand beside -0.0


def _by_name(path: Path, rows: list[dict[str, float] | None]) -> dict[str, list[float]]:
    """Return the further losses of the steps as a column for each name."""
    names = dict.fromkeys(name for row in rows if row for name in row)
    if len(names) > MOST_LOSSES:
        raise UsageError(f"{printable(path)} names {len(names)} further losses, where at most {MOST_LOSSES} belong")
    return {name: [(row or {}).get(name, math.nan) for row in rows] for name in names}


def _in_order(file: str, columns: dict[str, list[Any]], key: str, problems: list[str]) -> dict[str, list[Any]]:
    keys: list[int] = columns[key]
    if keys == list(range(1, len(keys) + 1)):
        return columns
    last = {k: i for i, k in enumerate(keys)}
    if len(last) < len(keys):
        repeated = min(k for i, k in enumerate(keys) if last[k] != i)
        problems.append(f"{file} repeats {key} {repeated}: of {len(keys)} rows, the last of each {key} counts")
    if any(a > b for a, b in itertools.pairwise(keys)):
        problems.append(f"{file} is not in the order of its {key}s, and was sorted")
    order = sorted(last)
    missing = next(k for k in itertools.count(1) if k not in last)
    if missing < order[-1]:
        problems.append(f"{file} has no {key} {missing}, though it goes to {order[-1]}")
    return {name: [column[last[k]] for k in order] for name, column in columns.items()}


def machine(config: dict[str, Any]) -> dict[str, str]:
    """Return what of the machine decides a run's bits: device, torch, and cuDNN or the CPU's threads.

    A run names cuDNN's version if it was on a GPU. The CPU's threads, which share its sums, decide nothing then. Older
    runs name no cuDNN.

    Args:
        config: what `config.json` holds.
    """
    environment = config["environment"]
    last = "threads" if environment.get("cudnn") is None else "cudnn"
    return {name: str(environment.get(name)) for name in ("device", "torch", last)}


def has_perplexity(unit: str | None) -> bool:
    """Return whether exp of a mean loss in `unit` is a perplexity: whether it is "nats a word", "nats a token" etc."""
    return unit is not None and unit.startswith("nats a ")


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean cross entropy in nats; inf where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
