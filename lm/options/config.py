"""The options of a run, from a command line, from Python, or from the run that it resumes."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.options.command_line import make_parser, read_command_line
from lm.options.options import MAY_CHANGE, SCRIPTS, Options, alias_of, checked, flag, options_of
from lm.options.resolve import check_effect, resolve
from roundoff.errors import UsageError, printable
from roundoff.runs.jsonfile import read_object


def parse_args(script_file: str, description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Read the command line of the trainer `script_file` (its `__file__`, and its `__doc__` for --help).

    Raises:
        UsageError: a value that no option takes, options that contradict each other or change nothing, or a device that
            is not there.
        SystemExit: 0 after --help.
    """
    script = Path(script_file).stem
    parser = make_parser(script, description)
    given = read_command_line(parser, script, sys.argv[1:] if argv is None else list(argv))
    options = merge(script, given)
    check_effect(options, given)
    return options


def make_args(script: str, **options: bool | int | float | str | Path | None) -> Options:
    """Return what `set_up` and `fit` need to know, without a command line: the options of the trainer `script`.

    `script` is "main", "main_fp16_optimizer" or "main_amp", and says which precision options there are; `options` are
    named as the flags, with "_" for "-". All others have their defaults.

    Raises:
        UsageError: there is no such script or option, or as for `parse_args`.
    """
    if script not in SCRIPTS:
        raise UsageError(f"script is {script!r}; allowed are {', '.join(SCRIPTS)}")
    given = checked(script, options)
    found = merge(script, given)
    check_effect(found, given)
    return found


def merge(script: str, given: Mapping[str, Any]) -> Options:
    """Return the options of the run that `given` asks for, on top of those of the run to resume where it names one.

    Args:
        script: the trainer.
        given: option -> value, checked.

    Raises:
        UsageError: they contradict each other, or are not those of the run to resume.
    """
    for name, value in given.items():
        _check_text(name, value)
    if given.get("resume") is None:
        return resolve(Options(script=script, **given))
    stored = stored_options(given["resume"], script)
    # What may change is left out: a package for it may be missing here, and that may be the reason to change it.
    before = resolve(Options(script=script, **{name: v for name, v in stored.items() if name not in MAY_CHANGE}))
    for name, value in given.items():
        if name not in (*MAY_CHANGE, "resume") and not alias_of(script, name):
            _check_same(given["resume"], name, getattr(before, name), value)
    for name, value in given.items():
        if (target := alias_of(script, name)) and (value or target != "dtype"):
            stored.pop(target, None)
    now = resolve(Options(script=script, **{**stored, **given}))
    if before.lr_schedule == "cosine":
        _check_length(given["resume"], Options(script=script, **stored), now)
    for name in options_of(script):
        if name not in (*MAY_CHANGE, "resume", "run_dir") and not alias_of(script, name):
            _check_same(given["resume"], name, getattr(before, name), getattr(now, name))
    return now


def _check_text(name: str, value: Any) -> None:
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{flag(name)} {printable(value)} is not UTF-8, as a run's records are; give the file another name"
        ) from None


def _check_same(run: Path, name: str, before: Any, now: Any) -> None:
    if now != before:
        shown = "the default" if before is None else printable(before)
        raise UsageError(
            f"--resume {run} with {flag(name)} {now}: the run was started with {shown}; "
            "leave the flag out, or start a new run"
        )


def _check_length(run: Path, before: Options, now: Options) -> None:
    """Raise UsageError where a run whose rate falls over its whole length is to get another length."""
    for name in ("epochs", "max_steps"):
        if (old := getattr(before, name)) != (new := getattr(now, name)):
            raise UsageError(
                f"--resume {run} with {flag(name)} {new}: the learning rate of the run falls along a cosine over the "
                f"length that it was started with ({'no such limit' if old is None else old}); leave the flag out, or "
                "start a new run"
            )


def stored_options(directory: Path, script: str) -> dict[str, Any]:
    """Return the options that the run in `directory` was started with, without those that are absent.

    Raises:
        UsageError: it holds no run of `script`.
    """
    where = f"--resume {printable(directory)}"
    if not (directory / "config.json").exists():
        raise UsageError(f"{where} holds no run (there is no config.json); give a run directory")
    try:
        options = read_object(directory / "config.json")["options"]
        ran, kept = options["script"], [n for n in options_of(script) if n != "resume" and not alias_of(script, n)]
    except OSError as error:
        raise UsageError(f"{where}: cannot read config.json ({error.strerror})") from None
    except (LookupError, TypeError):
        raise UsageError(
            f"{where}: config.json holds no options of a trainer; an older version, or another program, wrote it: "
            "start a new run"
        ) from None
    if ran != script:
        raise UsageError(f"{where} holds a run of {printable(ran, 40)}, not of {script}.py; use that script")
    try:
        return checked(script, {name: options.get(name) for name in kept})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
