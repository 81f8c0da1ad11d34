"""What a trainer says before and after training: what it is about to do, where the results are, and what to do next."""

import shlex
import sys
from pathlib import Path
from typing import Any

from lm.options.options import Options
from lm.training.checkpoint import Position
from roundoff import processes
from roundoff.errors import printable
from roundoff.runs.directory import RunDirectory
from roundoff.terminal import say


def say_before(args: Options, records: RunDirectory) -> None:
    """Say what is trained, in which precision, where, and where the results go."""
    if records.path is not None:  # rank 0
        for line in opening(args, records.config, records.path):
            say(line)


def say_after(args: Options, records: RunDirectory, end: Position | None) -> None:
    """Say where the results are, and the commands to go on with them.

    `end` is the position at which the run came to its end; None where it was interrupted before.
    """
    if records.path is not None:
        for line in closing(args, records.path, end, records.steps):
            say(line)


def say_how_to_go_on(args: Options, records: RunDirectory, stopped: str = "") -> None:
    """Say the command that goes on with a run; `stopped` says first why the run ends."""
    if records.path is not None:
        say(f"| {stopped}to go on: {resume_command(args, records.path)}")


def opening(args: Options, config: dict[str, Any], run_dir: Path) -> list[str]:
    """Return the lines for before training, of what `config.json` says of the run."""
    precision, corpus = config["precision"], config["job"]["corpus"]
    dtypes, scale = precision["dtypes"], precision["loss_scale"]
    weights = f"{dtypes['weights']} weights"
    if dtypes["master_weights"] != dtypes["weights"]:
        weights += f" with {dtypes['master_weights']} masters"
    scaled = f"dynamic loss scale from {args.init_scale:g} on" if scale is None else f"loss scale {scale:g}"
    several = f" in {processes.world_size()} processes" if processes.world_size() > 1 else ""
    threads = f", threads used: {config['environment']['threads']}" if args.device == "cpu" else ""
    replaced = ", where it replaces an earlier one" if args.resume is None and args.save.exists() else ""
    stays_in_warmup = args.max_steps is not None and args.max_steps < args.warmup
    return [
        f"| mode: {precision['mode']}: {precision['dtype']} products, {weights}, {scaled}",
        f"| device: {args.device}{several} ({config['environment']['device']}{threads})",
        f"| model: {args.model}, {config['parameters']:,} parameters",
        f"| data: {printable(config['corpus'])}, {corpus['train_tokens']:,} words to train on, {corpus['words']:,} "
        "different ones",
        f"| records go to {printable(run_dir)}, the best model to {printable(args.save)}{replaced}",
        *([f"| the warm-up of {args.warmup} steps does not end in {args.max_steps} steps"] if stays_in_warmup else []),
    ]


def closing(args: Options, run_dir: Path, end: Position | None, steps: int) -> list[str]:
    """Return the lines for after training, of so many `steps` in all, with commands to copy; `end` as above."""
    place = shlex.quote(printable(run_dir))
    lines = [
        f"| the best model is in {printable(args.save)}, the records are in {printable(run_dir)}",
        f"| to write text: {_python('generate')} --checkpoint {place}",
    ]
    if end is None:
        lines.append(f"| to go on: {resume_command(args, run_dir)}")
    elif flags := longer(args, end, steps):
        lines.append(f"| to train on: {resume_command(args, run_dir)} {flags}")
    return [*lines, f"| to compare it with another run: {_python('compare')} {place} RUN_DIR"]


def longer(args: Options, end: Position, steps: int) -> str:
    """Return the flags with which a run that has ended trains for up to as long again; "" where no flags do that."""
    if args.dry_run or args.lr_schedule == "cosine":  # whose length is fixed
        return ""
    flags = []
    if end.epoch > args.epochs:
        flags.append(f"--epochs {2 * args.epochs}")
    if args.max_steps is not None and steps >= args.max_steps:
        flags.append(f"--max-steps {2 * args.max_steps}")
    return " ".join(flags)


def resume_command(args: Options, run_dir: Path) -> str:
    """Return the command that goes on with a run, on this machine."""
    if processes.world_size() > 1:
        start = f"torchrun --nproc-per-node {processes.local_world_size()} {_place(args.script)}"
    else:
        start = _python(args.script)
    return f"{start} --resume {shlex.quote(printable(run_dir))}"


def _python(script: str) -> str:
    return f"python {_place(script)}"


def _place(script: str) -> str:
    """Return where the script is, as it stands beside the one that runs."""
    running = Path(sys.argv[0])
    beside = running.with_name(f"{script}.py") if running.suffix == ".py" else Path(f"{script}.py")
    return shlex.quote(printable(beside if beside.exists() else beside.name))
