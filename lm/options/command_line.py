"""The command line of a trainer, and the TOML file that --config names: each becomes a mapping of options."""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from lm.options.options import SCRIPTS, Option, checked, flag, help_of, option_of, options_of, whose
from roundoff.cli import OneLineParser, Switch, add_version
from roundoff.errors import UsageError


def make_parser(script: str | None, description: str | None) -> OneLineParser:
    """Return the parser of the trainer `script`, such as "main_amp"; None: of the options of all trainers.

    The result of parsing has the options that are given and no others.
    """
    program = script or SCRIPTS[0]
    parser = OneLineParser(
        prog=f"{program}.py",
        description=description,
        epilog=f"With Sacred: {program}.py [COMMAND] [with NAME=VALUE...] [-F DIR], where COMMAND is print_config, "
        f"save_config, print_dependencies or none to train; {program}.py help shows them all.",
        allow_abbrev=False,  # an abbreviation of today is ambiguous with the next new flag
        argument_default=argparse.SUPPRESS,
    )
    parser.elsewhere = whose
    add_version(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="take options from there, such as batch-size = 32 or tied = true; the command line wins",
    )
    groups: dict[str, Any] = {}
    for name, f in options_of(script).items():
        facts = option_of(f)
        group = groups.get(facts.group) or groups.setdefault(facts.group, parser.add_argument_group(facts.group))
        text = help_of(f)
        if f.default is not None and facts.kind is not bool:
            text += f" (default: {f.default})"
        _add(group, name, facts, text.replace("%", "%%"))
    return parser


def _add(group: Any, name: str, facts: Option, text: str) -> None:
    spellings = dict.fromkeys((flag(name), f"--{name.replace('_', '-')}"))
    if facts.kind is bool:
        group.add_argument(*spellings, action=Switch, help=text)
        return
    group.add_argument(*spellings, type=facts.kind, choices=facts.choices, metavar=facts.metavar, help=text)


def read_command_line(parser: OneLineParser, script: str | None, argv: list[str]) -> dict[str, Any]:
    """Return the options that `argv` gives, and those of its --config file that it does not give itself.

    Raises:
        UsageError: some option or value is wrong, wherever it comes from.
    """
    given = vars(parser.parse_args([with_dashes(parser, word) for word in argv]))
    path = given.pop("config", None)
    return given if path is None else read_config_file(path, script) | given


def with_dashes(parser: OneLineParser, word: str) -> str:
    """Spell a flag of `parser` with "-", as the parser has it: both spellings are taken."""
    name, equals, value = word.partition("=")
    spelt = name.replace("_", "-") + equals + value
    return spelt if name.startswith("--") and parser.knows(spelt) else word


def read_config_file(path: Path, script: str | None) -> dict[str, Any]:
    """Return the options in a TOML file, which has a line for each.

    They are named as on the command line without its leading dashes, with "-" or "_"; paths in it are relative to the
    working directory.

    Raises:
        UsageError: it cannot be read, or it says what no option does.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot read it ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path} is no TOML file: {error}") from None
    try:
        return checked(script, content)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


def part_with_trainers(parser: OneLineParser) -> None:
    """Let `parser`, of a program that takes flags of the trainers after --, say so where one stands before it."""
    trainers = make_parser(None, None)

    def advice(name: str) -> str | None:
        known = trainers.knows(with_dashes(trainers, name))
        return f"flags of the trainers go after --, as in {parser.prog} -- {name}" if known else None

    parser.elsewhere = advice


def check_after_dashes(parser: OneLineParser, flags: list[str]) -> None:
    """Raise UsageError where an option of `parser` that no trainer has stands among the `flags` after --."""
    trainers = make_parser(None, None)
    for word in flags:
        name = word.partition("=")[0]
        if name.startswith("--") and parser.knows(name) and not trainers.knows(name):
            parser.error(f"{name} after --: this is an option of {parser.prog} itself; give it before the --")
