"""The options of a run, from a command line, from Python, or from the run that it resumes."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.options.command_line import make_parser, read_command_line
from lm.options.options import SCRIPTS, Options, checked, flag, option_of, options_of
from lm.options.resolve import resolve
from roundoff.errors import UsageError, printable
from roundoff.runs.jsonfile import read_object


def parse_args(script_file: str, description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Read the command line of the trainer `script_file` (its `__file__`, and its `__doc__` for --help).

    Raises:
        UsageError: a value that no option takes, options that contradict each other, or a device that is not there.
        SystemExit: 0 after --help.
    """
    script = Path(script_file).stem
    parser = make_parser(script, description)
    return merge(script, read_command_line(parser, script, sys.argv[1:] if argv is None else list(argv)))


def make_args(script: str, **options: bool | int | float | str | Path | None) -> Options:
    """Return what `set_up` and `fit` need to know, without a command line: the options of the trainer `script`.

    `script` is "main", "main_fp16_optimizer" or "main_amp", and says which precision options there are; `options` are
    named as the flags, with "_" for "-". All others have their defaults.

    Raises:
        UsageError: there is no such script or option, or as for `parse_args`.
    """
    if script not in SCRIPTS:
        raise UsageError(f"script is {script!r}; allowed are {', '.join(SCRIPTS)}")
    return merge(script, checked(script, options))


def merge(script: str, given: Mapping[str, Any]) -> Options:
    """Return the options of the run that `given` asks for, on top of those of the run to resume where it names one.

    Args:
        script: the trainer.
        given: option -> value, checked.

    Raises:
        UsageError: they contradict each other, or are not those of the run to resume.
    """
    if given.get("resume") is None:
        return resolve(Options(script=script, **given))
    stored = stored_options(given["resume"], script)
    before = resolve(Options(script=script, **stored))
    now = resolve(Options(script=script, **{**stored, **given}))
    for name, f in options_of(script).items():
        old, new = getattr(before, name), getattr(now, name)
        if name == "run_dir":
            old, new = stored.get(name), given.get(name, stored.get(name))
        if new != old and not (option_of(f).may_change or _is_alias(name, f, script)):
            shown = "the default" if old is None else printable(old)
            raise UsageError(
                f"--resume {given['resume']} with {flag(name)} {new}: the run was started with {shown}; "
                "leave the flag out, or start a new run"
            )
    return now


def stored_options(directory: Path, script: str) -> dict[str, Any]:
    """Return the options that the run in `directory` was started with, but for aliases of others.

    Raises:
        UsageError: it holds no run of `script`.
    """
    where = f"--resume {printable(directory)}"
    if not (directory / "config.json").exists():
        raise UsageError(f"{where} holds no run (there is no config.json); give a run directory")
    try:
        options = read_object(directory / "config.json")["options"]
        ran, known = options["script"], options_of(script)
        if ran != script:
            raise UsageError(f"{where} holds a run of {printable(ran, 40)}, not of {script}.py; use that script")
        kept = {name: options.get(name) for name, f in known.items() if not _is_alias(name, f, script)}
        return checked(script, kept)
    except OSError as error:
        raise UsageError(f"{where}: cannot read config.json ({error.strerror})") from None
    except (LookupError, TypeError, AttributeError):
        raise UsageError(f"{where}: config.json holds no options of a trainer; start a new run") from None


def _is_alias(name: str, f: Any, script: str) -> bool:
    return option_of(f).alias or name == "resume" or (name == "fp16" and script == "main_amp")
