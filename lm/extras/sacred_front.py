"""The trainers under Sacred: the options of `lm.options` as the configuration of an Experiment.

Imported only where a command line asks for it. Sacred parses and shows the configuration, keeps its observers
informed, and has a run's `main` run with the `Options` that the configuration gives.
"""

import itertools
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lm.data import corpora
from lm.options.config import merge
from lm.options.options import DEFAULT_LR, Options, checked, help_of, options_of
from lm.options.resolve import check_effect, default_lr
from lm.training.description import git_commit
from roundoff import processes
from roundoff.cli import nearest
from roundoff.errors import RunError, UsageError, printable
from roundoff.runs.listeners import listening
from roundoff.runs.meter import curves

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # Sacred's own matter, not a user's
    import colorama
    from sacred import Experiment
    from sacred.commands import _format_config
    from sacred.config.config_dict import ConfigDict
    from sacred.config.config_summary import ConfigSummary
    from sacred.run import Run
    from sacred.utils import SacredError

NAMES = {"data": "dataset", "model": "model_type"}
"""Option -> its name in this front, if that is another one."""

DEFAULTS = {"batch_size": 32, "dataset": "./data", "lr": DEFAULT_LR["sgd"], "seed": 257, "tied": True}
"""Option -> default, if this front has one of its own."""

FIRST = (
    *("batch_size", "bptt", "clip", "dataset", "dropout", "emsize", "epochs", "log_interval", "lr", "model_type"),
    *("nhid", "nlayers", "save", "seed", "tied"),
)
"""The options that print_config shows first."""


class ConfigError(SacredError):
    """A value that no option takes. Sacred shows it as one of its own errors, without a traceback."""

    __module__ = "sacred"

    def __init__(self, message: str) -> None:
        super().__init__(message, print_traceback=False, print_usage=False)


class Configuration:
    """The options of a trainer as a source of Sacred's configuration: name, default and comment of each."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.names = {NAMES.get(name, name): name for name in options_of(script)}
        self.defaults = {
            name: DEFAULTS.get(name, _plain(options_of(script)[ours].default)) for name, ours in self.names.items()
        }
        self.comments = {name: help_of(options_of(script)[ours]) for name, ours in self.names.items()}
        self.comments["dataset"] += "; or a folder of such folders"
        self.asked: set[str] = set()

    def __call__(self, fixed: Any = None, preset: Any = None, fallback: Any = None) -> ConfigSummary:
        """Return the configuration, where `fixed` wins over the defaults.

        Raises:
            UsageError: `fixed` has what is no option.
        """
        asked = fixed or {}
        self.asked = set(asked)
        for name in asked:
            if name not in self.names:
                near = nearest(name, self.names)
                advice = f"did you mean {near}?" if near else f"there are {', '.join(self.names)}"
                raise UsageError(f"with: there is no option {printable(repr(name))}; {advice}")
        adamw = asked.get("use_optimizer") is True or asked.get("optimizer") == "adamw"
        defaults = self.defaults | {"lr": default_lr("adamw" if adamw else "sgd", asked.get("model_type", "LSTM"))}
        summary = ConfigDict(defaults)(fixed, preset, fallback)
        summary.docs.update(self.comments)
        return summary

    def options(self, config: dict[str, Any]) -> Options:
        """Return the options that `config` gives.

        To resume a run, only what was asked for counts: the rest is as that run has it.

        Raises:
            UsageError: some value is no option's, options contradict each other, or what was asked for changes nothing.
        """
        values = {ours: config[name] for name, ours in self.names.items()}
        if values["resume"] is not None:
            values = {ours: config[name] for name, ours in self.names.items() if name in self.asked}
        if values.get("data") is not None:
            values["data"] = corpora.find(str(values["data"]))
        options = merge(self.script, checked(self.script, values))
        others = [name for name in self.asked if config[name] != self.defaults[name]]  # a saved configuration has all
        check_effect(options, [self.names[name] for name in others if name in self.names])
        return options


def _plain(default: Any) -> Any:
    return str(default) if isinstance(default, Path) else default


class Observed:
    """A listener that hands on to a Sacred run what is recorded.

    Metrics are `train.<name>` by step, once an interval, and `valid.<name>` by epoch. The info has the run directory
    and `result.json`. The best model is an artifact.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.directory = self.model = Path()
        self.test_ppl: float | None = None

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        """Note where the run's files are."""
        self.run.info["run_dir"] = str(directory.absolute())
        self.directory, self.model = directory, Path(config["options"]["save"])

    def interval(self, row: dict[str, Any]) -> None:
        """Log the training."""
        self._log("train", row, row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """Log the validation."""
        self._log("valid", {name.removeprefix("valid_"): value for name, value in row.items()}, row["epoch"])

    def _log(self, part: str, row: dict[str, Any], step: int) -> None:
        for name, value in curves(row).items():
            self.run.log_scalar(f"{part}.{name}", value, step)

    def result(self, row: dict[str, Any]) -> None:
        """Keep the result and the model."""
        self.run.info["result"] = row
        self.test_ppl = row["test_ppl"]
        if (self.test_ppl is not None or self._was_saved()) and self.model.exists():  # else the file is another run's
            self.run.add_artifact(self.model)

    def _was_saved(self) -> bool:
        """Return whether the run has a best model: its first epoch has, unless it diverged in that."""
        with (self.directory / "epochs.jsonl").open(encoding="utf-8") as file:
            first = file.readline()
        return bool(first) and math.isfinite(float(json.loads(first)["valid_ppl"]))


class PassedError(BaseException):
    """Carries an error past Sacred, which would show a traceback of it, to `exit_code`, which needs none."""


class Trainer(Experiment):
    """An Experiment that ends with an error as every command of this project does."""

    def run(self, *args: Any, **kwargs: Any) -> Run:
        """See Experiment."""
        try:
            return super().run(*args, **kwargs)
        except (UsageError, RunError, OSError, MemoryError) as error:
            raise PassedError(error) from None
        except ConfigError as error:
            raise PassedError(UsageError(str(error))) from None


def check_words(argv: list[str], script: str, commands: Iterable[str]) -> None:
    """Raise UsageError where Sacred would show its usage, or a traceback, for the command line `argv`."""
    if argv[0] != "with" and not argv[0].startswith("-") and argv[0] not in (allowed := [*commands, "help"]):
        near = nearest(argv[0], allowed)
        advice = f"did you mean {near}? " if near else ""
        raise UsageError(f"{printable(repr(argv[0]))} is no command; {advice}there are {', '.join(allowed)}, and flags")
    after = argv[argv.index("with") + 1 :] if "with" in argv else []
    for word, following in itertools.zip_longest(after, after[1:], fillvalue="-"):
        name, _, value = word.removeprefix("--").removeprefix("no-").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in options_of(script):
            value = value or ("VALUE" if following.startswith("-") else following)
            example = printable(f"{NAMES.get(name, name)}={value}")
            raise UsageError(f"{printable(word)} after with: options are NAME=VALUE there, such as {example}")
    for word in itertools.takewhile(lambda word: not word.startswith("-"), after):
        if "=" not in word and not Path(word).exists():
            raise UsageError(f"with {printable(word)}: this is neither NAME=VALUE nor a file; give one of them")


def print_config(_run: Run) -> None:
    """Print the configuration with a comment on each option, and exit."""
    first = {name: value for name, value in _run.config.items() if name in FIRST}
    rest = {name: value for name, value in _run.config.items() if name not in FIRST}
    print(_format_config(first, _run.config_modifications))
    print(_format_config(rest, _run.config_modifications).partition("\n")[2])


def make_experiment(main: Callable[[Options], int], script_file: str, description: str | None) -> Experiment:
    """Return an Experiment that calls `main`, of the trainer `script_file` (its `__file__`; `__doc__` is the help)."""
    path = Path(script_file).resolve()
    experiment = Trainer(path.stem, base_dir=str(path.parent), save_git_info=False)
    experiment.doc = description or ""
    configuration = Configuration(path.stem)
    experiment.configurations.append(configuration)
    experiment.save_git_info = git_commit() is not None  # of one file: Sacred would list the repository for each
    experiment.add_source_file(str(path))
    experiment.save_git_info = False
    experiment.mainfile = next(source for source in experiment.sources if source.filename == str(path))
    for file in _own_sources():
        experiment.add_source_file(str(file))
    import torch

    experiment.add_package_dependency("torch", torch.__version__.partition("+")[0])  # Sacred knows no local part
    experiment.command(print_config, unobserved=True)

    @experiment.config_hook
    def check(config: dict[str, Any], command_name: str, logger: Any) -> dict[str, Any]:
        """Refuse before anything is written."""
        seed = config["seed"]
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**32):
            raise ConfigError(f"--seed {seed!r} is not a whole number of at least 0 and below 2**32, as numpy's is")
        if command_name == "train":
            try:
                configuration.options(config)
            except UsageError as error:
                raise ConfigError(str(error)) from None
        return {}

    @experiment.main
    def train(_run: Run) -> float | None:
        """Train, and return the perplexity on the test text."""
        observed = Observed(_run)
        with listening(observed):
            main(configuration.options(_run.config))
        return observed.test_ppl

    return experiment


def _own_sources() -> list[Path]:
    """Return the files of this project that are loaded, so that observers keep what really ran."""
    modules = [module for name, module in sys.modules.items() if re.match(r"(lm|roundoff|apex_compat)(\.|$)", name)]
    return sorted({Path(module.__file__) for module in modules if module.__file__})


def run(main: Callable[[Options], int], script_file: str, description: str | None, argv: list[str]) -> int:
    """Do what the command line `argv` asks of Sacred; return the exit code.

    Raises:
        UsageError, RunError: see `fit`, or the command line is a mistake.
    """
    experiment = make_experiment(main, script_file, description)
    unobserved = ["--unobserved"] if processes.rank() > 0 else []
    # Sacred's colours are for terminals that want them.
    with colorama.colorama_text(strip=True if os.environ.get("NO_COLOR") else None):
        try:
            check_words(argv, Path(script_file).stem, experiment.commands)
            experiment.run_commandline([script_file, *argv, *unobserved])
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            program = Path(script_file).name
            raise UsageError(
                f"{printable(shlex.join(argv))} is no command line of Sacred; see {program} help, "
                f"or {program} --help for the flags"
            ) from None
        except PassedError as passed:
            raise passed.args[0] from None
    return 0
