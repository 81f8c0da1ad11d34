"""From the words of a command line to flags: those of a --config file, of the run to resume, or Sacred's."""

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.training.checkpoint import command_of
from roundoff.cli import OneLineParser, as_flags
from roundoff.errors import UsageError, printable

MAY_CHANGE = ("epochs", "log_interval", "checkpoint_interval", "tensorboard", "data", "save", "onnx_export")
"""What a resumed run may be given anew: where it ends, what it shows, and where its files are now."""


def read_flags(parser: OneLineParser, script: str, argv: list[str]) -> argparse.Namespace:
    """`argv` parsed, on top of the flags of the run to resume and of the --config file where there are such.

    The result has `argv`, the flags that lead to it without that file, and `changed`, whether they are others than
    the resumed run had.

    Raises:
        UsageError: some flag or value is wrong, wherever it comes from, or is not that of the run to resume.
    """
    argv = expand(parser, argv)
    for word in argv:
        if not _is_text(word):
            raise UsageError(f"{printable(word)} is not UTF-8, as a run's records are; give the file another name")
    given = parser.parse_args(argv)
    given.argv, given.changed = argv, False
    if given.resume is None:
        return given
    flags = command_of(given.resume, script)
    before, args = parser.parse_args(flags), parser.parse_args([*flags, *argv])
    differing = [name for name, value in vars(args).items() if vars(before).get(name) != value and name != "resume"]
    for name in differing:
        if name not in MAY_CHANGE:
            raise UsageError(
                f"--resume {given.resume} with --{name.replace('_', '-')} {getattr(args, name)}: the run was started "
                f"with {vars(before).get(name, 'the default')}; leave the flag out, or start a new run"
            )
    args.argv = [*flags, *without(argv, "--resume")] if differing else flags
    args.changed = bool(differing)
    return args


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def without(argv: list[str], flag: str) -> list[str]:
    """`argv` without each `flag` and its value."""
    words = iter(argv)
    rest = []
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            rest.append(word)
    return rest


def expand(parser: OneLineParser, argv: list[str]) -> list[str]:
    """`argv` with the content of the --config file, where one is given, before it as flags.

    The file is TOML: a line for each option, named as on the command line without its leading dashes, with "-" or "_";
    paths in it are relative to the working directory.

    Raises:
        UsageError: it cannot be read, or it says what no flag does.
    """
    path: Path | None = getattr(parser.parse_args(argv), "config", None)
    if path is None:
        return argv
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot read it ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path} is no TOML file: {error}") from None
    try:
        flags = to_flags(parser, content)
        parser.parse_args(flags)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None
    return [*flags, *without(argv, "--config")]


def to_flags(parser: OneLineParser, content: Mapping[str, Any]) -> list[str]:
    """The flags that say the same as `content`: a value, or None, for each name, which is spelt with "-" or "_".

    Raises:
        UsageError: a name is no option's or is there twice, or a value is no option's.
    """
    options = parser.options()
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in options:
            raise UsageError(f"there is no option {key!r}; {_nearest(name, list(options))}")
        if name in values:
            raise UsageError(f"{key!r} stands there twice, with - and with _")
        values[name] = value
    return as_flags(options, values)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def is_for_sacred(parser: OneLineParser, argv: list[str]) -> bool:
    """Whether a command line is one of Sacred's: no flag takes a bare word, nor has one letter but -h."""
    if not argv:
        return False
    first = argv[0]
    if re.fullmatch("-[A-Za-z]", first):
        return first != "-h"
    return not first.startswith("-") or ("with" in argv and not parser.knows(first))


def run_sacred(script_file: str, description: str | None, argv: list[str]) -> int:
    """Do what the command line `argv` asks of Sacred; return the exit code.

    Raises:
        UsageError: Sacred is not installed, or the run was refused.
    """
    try:
        from lm.extras import sacred_front
    except ModuleNotFoundError as error:
        if error.name not in ("sacred", "colorama", "pkg_resources"):  # what the extra installs
            raise
        raise UsageError(
            f"{argv[0]!r} is for Sacred, which is not installed: pip install 'roundoff[sacred]'; "
            "for the flags that need nothing else, see --help"
        ) from None
    return sacred_front.run(script_file, description, argv)
