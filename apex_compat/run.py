"""Runs an unchanged script that imports apex."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from apex_compat import children
from apex_compat.provide import PACKAGES, find_installed, provide_apex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

WITHOUT_CUDA = re.compile(
    "Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device"
    "|Cannot access accelerator device when none is available|Cannot initialize CUDA without|_cuda_setDevice"
)
"""What torch says, in its several builds, where a script asks for CUDA that is not there and `cuda_on_cpu` helps."""


def run_script(script: str, args: list[str], device: str | None = None) -> int:
    """Run a script, with `import apex` in it and in the processes that it starts.

    Args:
        script: a Python file.
        args: its arguments.
        device: "cpu" runs on the CPU what it does on CUDA.

    Returns:
        The exit code. It is 0, or 2 if the script cannot be read. It is 1 if the script raised and 130 after
        Ctrl-C, both after the script's traceback; a line tells of `--device cpu` where CUDA was missing. A script's
        own SystemExit passes through.
    """
    try:
        source = Path(script).read_bytes()
    except OSError as error:
        print(f"error: SCRIPT is {script!r}: {error.strerror}; give a Python file", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        stack.enter_context(provide_apex())
        stack.enter_context(mock.patch.dict(os.environ, children.child_environment(device)))
        if device == "cpu":
            print("apex_compat: running on the CPU what the script does on CUDA (--device cpu)", file=sys.stderr)
            stack.enter_context(importlib.import_module("apex_compat.cuda_on_cpu").cuda_on_cpu())
        module = stack.enter_context(_as_main(script, args))
        _tell_of_an_older_apex()
        raised = _run(source, script, module)
    if raised is None:
        return 0
    if device is None and WITHOUT_CUDA.search(str(raised)) and not _has_cuda():
        print(
            "apex_compat: this script asks for CUDA, which is not here; try: python -m apex_compat --device cpu "
            + shlex.join([script, *args]),
            file=sys.stderr,
        )
    return 130 if isinstance(raised, KeyboardInterrupt) else 1


def installed_packages() -> dict[str, str]:
    """Return those of `PACKAGES` that the installed apex has, with their files. Nothing is imported."""
    apex = find_installed("apex")
    found = {name: find_installed(f"apex.{name}", apex.submodule_search_locations) for name in PACKAGES if apex}
    return {name: str(spec.origin) for name, spec in found.items() if spec}


def _tell_of_an_older_apex() -> None:
    """Say that the installed apex has what NVIDIA has removed since: its O1 fails on today's torch."""
    old = [name for name in ("RNN", "amp", "fp16_utils", "parallel") if name in installed_packages()]
    if old:
        line = f"apex_compat: the script gets {', '.join(old)} of the installed apex, not of apex_compat"
        print(line, file=sys.stderr)


@contextmanager
def _as_main(script: str, args: list[str]) -> Iterator[ModuleType]:
    """Set up `__main__`, sys.argv and sys.path as `python SCRIPT ARGS...` would, and restore them at the end."""
    module = ModuleType("__main__")
    module.__file__ = script
    main_before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        with (
            mock.patch.object(sys, "argv", [script, *args]),
            mock.patch.object(sys, "path", [str(Path(script).resolve().parent), *sys.path[1:]]),
        ):
            yield module
    finally:
        sys.modules["__main__"] = main_before


def _run(source: bytes, script: str, module: ModuleType) -> BaseException | None:
    """Run the script; show the traceback of what it raises, and return that."""
    try:
        code: CodeType = compile(source, script, "exec")
        exec(code, vars(module))  # noqa: S102  the purpose of this program
    except (Exception, KeyboardInterrupt) as error:
        # The first frame is this function; the rest, none for a syntax error, is the script's own traceback.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return error
    return None


def _has_cuda() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())
