"""Switches apex on and off for every process of a Python environment, by one `.pth` file in its site-packages."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from apex_compat.provide import EXTENSIONS, PACKAGES, find_installed
from apex_compat.run import installed_packages

NAME = "apex_compat-enabled.pth"
LINE = (
    "import sys; exec('try:\\n from apex_compat.provide import provide_apex\\n provide_apex()\\n"
    "except Exception: pass')  # written by python -m apex_compat enable\n"
)
"""What Python runs at its start. It does nothing if apex_compat has been uninstalled."""


def pth_file() -> Path:
    """Return the file that `enable` writes, in the site-packages of this Python."""
    return Path(sysconfig.get_path("purelib")) / NAME


def is_installed() -> bool:
    """Return True if a process finds apex_compat without this folder and this PYTHONPATH."""
    command = [sys.executable, "-E", "-P", "-c", "import apex_compat"]
    return subprocess.run(command, check=False, capture_output=True, cwd=sys.prefix).returncode == 0  # noqa: S603


def enable() -> int:
    """Write the file and say so. Return the exit code: 1 if that cannot be done."""
    path = pth_file()
    if not is_installed():
        here = Path(__file__).parents[1]
        line = f"apex_compat is not installed in {sys.prefix}, it was found in {here}; install it there first"
        print(f"error: {line}", file=sys.stderr)
        return 1
    if _is_enabled():
        print(f"apex_compat is enabled already, by {path}")
        return 0
    try:
        path.write_text(LINE, encoding="utf-8")
    except OSError as error:
        return _refused("write", error)
    print(f"wrote {path}, one line:")
    print(f"    {LINE}", end="")
    print(f"From now on `import apex` works in every process of {sys.executable}, without a runner.")
    print("To undo it: python -m apex_compat disable, or delete that file.")
    return 0


def disable() -> int:
    """Remove the file and say so. Return the exit code: 1 if that cannot be done."""
    path = pth_file()
    try:
        path.unlink()
    except FileNotFoundError:
        print(f"apex_compat is not enabled: there is no {path}")
    except OSError as error:
        return _refused("remove", error)
    else:
        print(f"removed {path}; `import apex` is again what it was")
    return 0


def status() -> int:
    """Print whether the file is there, and where each module of apex comes from while apex is provided. Return 0."""
    path = pth_file()
    print(f"enabled by {path}" if _is_enabled() else f"not enabled: python -m apex_compat enable would write {path}")
    installed = find_installed("apex")
    print(f"installed apex: {installed.origin if installed else 'none'}")
    found = installed_packages()
    rows = [(f"apex.{name}", found.get(name)) for name in PACKAGES]
    for name in EXTENSIONS:
        spec = find_installed(name)
        rows.append((name, str(spec.origin) if spec else None))
    for name, origin in rows:
        print(f"  {name:<25} {origin or 'apex_compat'}")
    rest = "as that apex has it" if installed else "not offered; importing it says what to use"
    print(f"  {'the rest':<25} {rest}")
    return 0


def _is_enabled() -> bool:
    path = pth_file()
    return path.is_file() and path.read_text(encoding="utf-8") == LINE


def _refused(what: str, error: OSError) -> int:
    print(
        f"error: cannot {what} {pth_file()}: {error.strerror}; use a virtual environment, "
        "or python -m apex_compat SCRIPT, which writes nothing",
        file=sys.stderr,
    )
    return 1
