"""Runs at the start of a process of a script of `python -m apex_compat`; see the package. It never stops the process.

An environment may have a sitecustomize of its own. That one runs afterwards.
"""

from __future__ import annotations

import importlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  pathlib takes milliseconds to import
ROOT = os.path.dirname(os.path.dirname(HERE))  # noqa: PTH120


def provide() -> None:
    """Provide apex if this is a process of the runner's environment, and not of some other Python."""
    if os.environ.get("APEX_COMPAT_PREFIX") != sys.prefix:
        return
    if ROOT not in sys.path:
        sys.path.append(ROOT)  # the runner may have been started in a checkout
    importlib.import_module("apex_compat.provide").provide_apex()
    if os.environ.get("APEX_COMPAT_DEVICE") == "cpu":
        importlib.import_module("apex_compat.children.after_torch").use_cpu_after_import_of_torch()


def run_the_next() -> None:
    """Run the sitecustomize that this one hides."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]  # noqa: PTH100
    this = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        if this:
            sys.modules["sitecustomize"] = this


if __name__ == "sitecustomize":
    try:
        provide()
    except Exception as error:
        print(f"apex_compat: this process has no apex: {error}", file=sys.stderr)
    run_the_next()
