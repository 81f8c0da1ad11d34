"""The entry point of a trainer: from its command line to its exit code.

This module imports no torch. A trainer calls `answer_early` before it imports torch, which takes seconds.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from lm.options.command_line import make_parser, with_dashes
from lm.options.config import parse_args
from lm.options.options import Options
from roundoff import processes, program
from roundoff.cli import OneLineParser, complete
from roundoff.errors import UsageError


def answer_early(script_file: str, description: str | None) -> None:
    """End the program where its command line asks for help or for completions, or is a mistake; else do nothing.

    The arguments are those of `run_trainer`, which reads the command line again. The processes of torchrun wait for
    `run_trainer`, which lets one of them complain for all.
    """
    if processes.launched():
        return
    parser = make_parser(Path(script_file).stem, description)
    complete(parser)
    if is_for_sacred(parser, sys.argv[1:]):
        return

    def read() -> int:
        parse_args(script_file, description)
        return 0

    if code := program.exit_code(read):
        sys.exit(code)


def run_trainer(main: Callable[[Options], int], script_file: str, description: str | None) -> int:
    """Call `main` with the options that the command line gives, or let Sacred call it; return the exit code.

    Args:
        main: trains.
        script_file, description: the trainer's `__file__`, and its `__doc__` for --help.
    """
    from lm.training.program import exit_code  # here, since torch takes seconds

    return exit_code(lambda: _run(main, script_file, description, sys.argv[1:]))


def _run(main: Callable[[Options], int], script_file: str, description: str | None, argv: list[str]) -> int:
    parser = make_parser(Path(script_file).stem, description)
    complete(parser)
    if not is_for_sacred(parser, argv):
        return main(parse_args(script_file, description, argv))
    try:
        from lm.extras import sacred_front
    except ModuleNotFoundError as error:
        if error.name not in ("sacred", "colorama", "pkg_resources"):  # what the extra installs
            raise
        raise UsageError(
            f"{argv[0]!r} is for Sacred, which is not installed: pip install 'roundoff[sacred]'; "
            "for the flags that need nothing else, see --help"
        ) from None
    return sacred_front.run(main, script_file, description, argv)


def is_for_sacred(parser: OneLineParser, argv: list[str]) -> bool:
    """Return whether a command line is one of Sacred's: no flag takes a bare word, nor has one letter but -h."""
    if not argv:
        return False
    first = with_dashes(parser, argv[0])
    if re.fullmatch("-[A-Za-z]", first):
        return first != "-h"
    return not first.startswith("-") or ("with" in argv and not parser.knows(first))
