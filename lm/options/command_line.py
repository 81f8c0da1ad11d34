"""The command line of a trainer, and the TOML file that --config names: each becomes a mapping of options."""

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

from lm.options.options import SCRIPTS, Option, checked, flag, option_of, options_of
from roundoff.cli import OneLineParser, Switch, add_version
from roundoff.errors import UsageError, printable


def make_parser(script: str | None, description: str | None) -> OneLineParser:
    """Return the parser of the trainer `script`, such as "main_amp"; None: of the options of all trainers.

    The result of parsing has the options that are given and no others.
    """
    name = script or SCRIPTS[0]
    parser = OneLineParser(
        prog=f"{name}.py",
        description=description,
        epilog=f"With Sacred: {name}.py [COMMAND] [with NAME=VALUE...] [-F DIR], where COMMAND is print_config, "
        f"save_config, print_dependencies or none to train; {name}.py help shows them all.",
        allow_abbrev=False,  # an abbreviation of today is ambiguous with the next new flag
        argument_default=argparse.SUPPRESS,
    )
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
        _add(group, name, facts, f.default)
    return parser


def _add(group: Any, name: str, facts: Option, default: Any) -> None:
    spellings = list(dict.fromkeys((flag(name), f"--{name.replace('_', '-')}")))
    if facts.kind is bool:
        group.add_argument(*spellings, action=Switch, help=facts.help)
        return
    shown = facts.otherwise or default
    explained = facts.help if shown is None else f"{facts.help} (default: {shown})"
    group.add_argument(
        *spellings, type=facts.kind, choices=facts.choices, metavar=facts.metavar, help=explained.replace("%", "%%")
    )


def read_command_line(parser: OneLineParser, script: str | None, argv: list[str]) -> dict[str, Any]:
    """Return the options that `argv` gives, and those of its --config file that it does not give itself.

    Raises:
        UsageError: some option or value is wrong, wherever it comes from.
    """
    given = vars(parser.parse_args([_with_dashes(word) for word in argv]))
    path = given.pop("config", None)
    given = given if path is None else read_config_file(path, script) | given
    for name, value in given.items():
        if not _is_text(str(value)):
            raise UsageError(
                f"{flag(name)} {printable(value)} is not UTF-8, as a run's records are; give the file another name"
            )
    return given


def _with_dashes(word: str) -> str:
    """Spell a flag with "-", as the parser has it: both spellings are taken."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[a-z0-9_-]+", name) else word


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


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
