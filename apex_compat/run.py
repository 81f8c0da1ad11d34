"""Runs an unchanged script that imports apex."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType
from unittest import mock

from apex_compat import children
from apex_compat.provide import PACKAGES, find_installed, provide_apex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.machinery import ModuleSpec
    from types import CodeType

WITHOUT_CUDA = re.compile(
    "Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device"
    "|Cannot access accelerator device when none is available|Cannot initialize CUDA without|_cuda_setDevice"
)
"""What torch says, in its several builds, where a script asks for CUDA that is not there and `cuda_on_cpu` helps."""


_until_exit = ExitStack()


@dataclass(frozen=True)
class Program:
    """A script, or a module that runs as one.

    Attributes:
        argument: its first word, sys.argv[0].
        file: the absolute path.
        code: its source, or its code.
        folder: what is first in sys.path.
        spec: that of the module; None for a script.
    """

    argument: str
    file: str
    code: bytes | CodeType
    folder: str
    spec: ModuleSpec | None = None


def run_script(
    script: str, args: list[str], device: str | None = None, is_module: bool = False, restore: bool = True
) -> int:
    """Run a script, with `import apex` in it and in the processes that it starts.

    Args:
        script: a Python file, or the name of a module.
        args: its arguments.
        device: "cpu" runs on the CPU what it does on CUDA.
        is_module: True runs a module, as `python -m` does.
        restore: False leaves all as the script has it, where the process ends now. Its threads and exit handlers go on.

    Returns:
        The exit code. It is 0, or 2 if the script cannot be read. It is 1 if the script raised and 130 after
        Ctrl-C, both after the script's traceback; a line tells of `--device cpu` where CUDA was missing. A script's
        own SystemExit passes through.
    """
    with ExitStack() if restore else nullcontext(_until_exit) as stack:
        stack.enter_context(provide_apex())
        try:
            program = _find_module(script) if is_module else _read_script(script)
        except (OSError, ImportError, ValueError) as error:
            reason = f"{error.strerror}; give a Python file" if isinstance(error, OSError) else str(error)
            print(f"error: {'MODULE' if is_module else 'SCRIPT'} is {script!r}: {reason}", file=sys.stderr)
            return 2
        stack.enter_context(mock.patch.dict(os.environ, children.child_environment(device)))
        if device == "cpu":
            print("apex_compat: running on the CPU what the script does on CUDA (--device cpu)", file=sys.stderr)
            stack.enter_context(importlib.import_module("apex_compat.cuda_on_cpu").cuda_on_cpu())
        module = stack.enter_context(_as_main(program, args))
        _tell_of_an_older_apex()
        raised = _run(program, module)
    if raised is None:
        return 0
    if device is None and WITHOUT_CUDA.search(str(raised)) and not _has_cuda():
        print(
            "apex_compat: this script asks for CUDA, which is not here; try: python -m apex_compat --device cpu "
            + shlex.join([*(["-m"] if is_module else []), script, *args]),
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


def _read_script(script: str) -> Program:
    # The path is Python's: absolute, and otherwise as it was given.
    file = os.path.join(os.getcwd(), script)  # noqa: PTH109, PTH118
    return Program(script, file, Path(script).read_bytes(), str(Path(script).resolve().parent))


def _find_module(name: str) -> Program:
    """Find a module, or the `__main__` of a package, from the working folder on.

    Raises:
        ImportError: there is none, or it is not Python.
    """
    folder = os.getcwd()  # noqa: PTH109
    with mock.patch.object(sys, "path", [folder, *sys.path[1:]]):
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        code = spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        raise ImportError("there is no such module to run in Python's path; give the name of a Python module")
    return Program(str(spec.origin), str(spec.origin), code, folder, spec)


@contextmanager
def _as_main(program: Program, args: list[str]) -> Iterator[ModuleType]:
    """Set up `__main__`, sys.argv and sys.path as `python SCRIPT ARGS...` would, and restore them at the end."""
    module = ModuleType("__main__")
    module.__file__ = program.file
    if program.spec:
        module.__spec__, module.__package__ = program.spec, program.spec.parent
    main_before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        with (
            mock.patch.object(sys, "argv", [program.argument, *args]),
            mock.patch.object(sys, "path", [program.folder, *sys.path[1:]]),
        ):
            yield module
    finally:
        sys.modules["__main__"] = main_before


def _run(program: Program, module: ModuleType) -> BaseException | None:
    """Run the script; show the traceback of what it raises, and return that."""
    try:
        code = program.code
        exec(compile(code, program.file, "exec") if isinstance(code, bytes) else code, vars(module))  # noqa: S102  the purpose of this program
    except (Exception, KeyboardInterrupt) as error:
        # The first frame is this function; the rest, none for a syntax error, is the script's own traceback.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return error
    return None


def _has_cuda() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())
