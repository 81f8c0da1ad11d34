"""`python -m apex_compat migrate SCRIPT [--write]`."""

from __future__ import annotations

import difflib
import io
import sys
import tokenize
from pathlib import Path

from apex_compat.migration.script import migrate_text


def migrate(script: str, write: bool = False) -> int:
    """Print what each apex call of a script is in torch.amp, and the diff of what can be changed mechanically.

    Args:
        script: a Python file.
        write: True changes the file.

    Returns:
        The exit code: 0, 2 if the file cannot be read or is no Python, 1 if it cannot be written.
    """
    path = Path(script)
    try:
        data = path.read_bytes()
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        text = data.decode(encoding)
        unix = text.replace("\r\n", "\n")
        migrated = migrate_text(unix)
    except OSError as error:
        return _error(script, f"{error.strerror}; give a Python file", 2)
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line}" if line else ""
        return _error(script, f"cannot be read as Python{where}: {getattr(error, 'msg', error)}", 2)
    if not migrated.remarks and migrated.text == unix:
        print(f"{script} has nothing of apex")
        return 0
    for number, what, remark in migrated.remarks:
        print(f"{script}:{number}: {what}: {remark}")
    before, after = (each.splitlines(keepends=True) for each in (unix, migrated.text))
    for line in difflib.unified_diff(before, after, script, script):
        print(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n", end="")
    if write and migrated.text != unix:
        ends = "\r\n" if "\r\n" in text else "\n"
        try:
            path.write_bytes(migrated.text.replace("\n", ends).encode(encoding))
        except OSError as error:
            return _error(script, f"cannot be written: {error.strerror}", 1)
        print(f"{script} is changed")
    return 0


def _error(script: str, reason: str, code: int) -> int:
    print(f"error: SCRIPT is {script!r}: {reason}", file=sys.stderr)
    return code
