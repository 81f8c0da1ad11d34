"""Runs an unchanged script that imports apex.fp16_utils.

python -m apex_compat [--device cpu] SCRIPT [ARGS...]
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from unittest import mock

import torch

from apex_compat.cuda_on_cpu import cuda_on_cpu
from apex_compat.provide import provide_apex

WITHOUT_CUDA = re.compile(
    "Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device"
    "|Cannot access accelerator device when none is available|Cannot initialize CUDA without|_cuda_setDevice"
)
"""What torch says, in its several builds, where a script asks for CUDA that is not there and `cuda_on_cpu` helps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script that `argv` names, with the arguments that follow it.

    Args:
        argv: the command line's arguments by default.

    Returns:
        The exit code. It is 0, or 2 if the script cannot be read. It is 1 if the script raised and 130 after
        Ctrl-C, both after the script's traceback; a line tells of `--device cpu` where CUDA was missing. A script's
        own SystemExit passes through.
    """
    parser = argparse.ArgumentParser(
        prog="python -m apex_compat",
        description="Run SCRIPT as it is. Its `import apex.fp16_utils` gets apex_compat.fp16_utils.",
    )
    parser.add_argument(
        "--device",
        choices=["cpu"],
        help="run what the script does on CUDA on the CPU (.cuda(), device='cuda')",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    try:
        source = Path(options.script).read_bytes()
    except OSError as error:
        print(f"error: SCRIPT is {options.script!r}: {error.strerror}; give a Python file", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        stack.enter_context(provide_apex())
        if options.device == "cpu":
            print("apex_compat: running on the CPU what the script does on CUDA (--device cpu)", file=sys.stderr)
            stack.enter_context(cuda_on_cpu())
        module = stack.enter_context(_as_main(options.script, options.args))
        raised = _run(source, options.script, module)
    if raised is None:
        return 0
    if options.device is None and WITHOUT_CUDA.search(str(raised)) and not torch.cuda.is_available():
        again = shlex.join([options.script, *options.args])
        print(
            "apex_compat: this script asks for CUDA, which is not here; try: python -m apex_compat --device cpu "
            + again,
            file=sys.stderr,
        )
    return 130 if isinstance(raised, KeyboardInterrupt) else 1


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


if __name__ == "__main__":
    sys.exit(main())
