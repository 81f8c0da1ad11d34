"""The report of one part: what was found against what was expected, as lines on stdout and as a JSON file."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roundoff.runs.json_text import to_json

UNFINISHED = "it has not ended"


class Report:
    """Keeps what a part finds. The file is written anew with each entry, so that nothing is lost with the process.

    Attributes:
        content: the object in the file. `checks` are the expectations, `figures` the measurements. `error` is None
            where the part has ended, and every entry that had to be as expected was.

    Args:
        path: the file.
        part: name of the part.
        device: of the part.
    """

    def __init__(self, path: Path, part: str, device: str) -> None:
        self._path = path
        self._start = time.monotonic()
        self._errors: list[str] = []
        self.content: dict[str, Any] = {
            "part": part,
            "device": device,
            "command": sys.argv[1:],
            "error": UNFINISHED,
            "seconds": None,
            "checks": [],
            "figures": [],
        }
        self._write()

    def check(
        self,
        name: str,
        found: str,
        expected: str,
        *,
        as_expected: bool | None = None,
        required: bool = False,
        means: tuple[str, str] = ("", ""),
    ) -> None:
        """Print and keep one expectation.

        Args:
            name: what was asked.
            found: the answer.
            expected: the answer that was expected.
            as_expected: whether `found` is as expected; by default, whether the two are equal.
            required: whether another answer is a fault of this project, and so a failure of the part.
            means: what follows if the answer is as expected, and if it is not.
        """
        good = found == expected if as_expected is None else as_expected
        entry = {"name": name, "found": found, "expected": expected, "as_expected": good, "required": required}
        meaning = means[0] if good else means[1]
        if meaning:
            entry["means"] = meaning
        self.content["checks"].append(entry)
        if required and not good:
            self._errors.append(f"{name}: {found}")
        self._write()
        self._say(line_of(entry))

    def figure(self, line: str, **values: Any) -> None:
        """Print `line`, and keep the figures behind it."""
        self.content["figures"].append(values)
        self._write()
        self._say(f"{'figure':11} | {line}")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Let the part go on where the block fails; the part has failed then."""
        try:
            yield
        except Exception as error:  # whatever it is, the other figures are worth having
            self._failed(f"{what}: {one_line(error)}")

    def fail(self, error: Exception) -> None:
        """Keep what ended the part."""
        self._failed(one_line(error))

    def end(self) -> None:
        """Close the report."""
        self.content["error"] = "; ".join(self._errors) or None
        self._write()

    def _failed(self, message: str) -> None:
        self._errors.append(message)
        self.content.setdefault("tracebacks", []).append(traceback.format_exc())
        self.content["error"] = "; ".join(self._errors)
        self._write()
        self._say(f"{'FAILED':11} | {message}")

    def _say(self, line: str) -> None:
        print(f"{self.content['part']:8} | {line}", flush=True)

    def _write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._start, 1)
        write(self._path, self.content)


def line_of(check: Mapping[str, Any]) -> str:
    """Return an entry of `checks` as a line."""
    verdict = "as expected" if check["as_expected"] else "WRONG" if check["required"] else "unexpected"
    meaning = f" -> {check['means']}" if "means" in check else ""
    return f"{verdict:11} | {check['name']}: {check['found']} (expected: {check['expected']}){meaning}"


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all. `roundoff.runs.jsonfile` would do it, but needs filelock."""
    beside = path.with_suffix(".tmp")
    beside.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)  # noqa: PTH105


def mark(path: Path, error: str) -> dict[str, Any]:
    """Keep `error` in the report of a part whose process has died; return the report."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = content["error"]
    content["error"] = error if before in (None, UNFINISHED) else f"{before}; {error}"
    write(path, content)
    return content
