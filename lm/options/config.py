"""What the three trainers are told: their flags, checked and resolved, and what follows from them for the process."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lm.model.language_model import check_model_flags
from lm.model.onnx_file import check_onnx_export
from lm.options.command_line import is_for_sacred, read_flags, run_sacred, to_flags
from lm.options.device import device_of
from lm.options.optimizers import resolve_optimizer
from lm.options.options import FP16_STATIC_LOSS_SCALE, make_parser
from lm.training import distributed
from roundoff import processes
from roundoff.cli import complete
from roundoff.device import keep_freed_memory, set_tf32
from roundoff.errors import UsageError
from roundoff.runs.listeners import event_files

SCRIPTS = ("main", "main_fp16_optimizer", "main_amp")


def parse_args(script_file: str, description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line of the trainer `script_file` (its `__file__`, and its `__doc__` for --help).

    Beside the flags the result has `script`, `mode` (which precision management, in a word or two), `dtype`
    ("float16", "bfloat16", "float32") and `static_loss_scale` resolved (None: dynamic).

    Raises:
        UsageError: a value that no flag takes, flags that contradict each other, or a device that is not there.
        SystemExit: 0 after --help; with no `argv` given, the end of what the command line asks of Sacred.
    """
    script = Path(script_file).stem
    parser = make_parser(script, description)
    complete(parser)
    if argv is None and is_for_sacred(parser, sys.argv[1:]):
        raise SystemExit(run_sacred(script_file, description, sys.argv[1:]))
    args = read_flags(parser, script, sys.argv[1:] if argv is None else list(argv))
    args.script = script
    if args.tensorboard:
        event_files()  # to refuse it before anything is written
    if args.onnx_export is not None:
        check_onnx_export(args)
    check_model_flags(args)
    args.device = device_of(args, processes.local_world_size())
    if args.device == "cuda" and processes.world_size() > 1:
        args.device = f"cuda:{processes.local_rank()}"
    if args.tf32 and not args.device.startswith("cuda"):
        raise UsageError(f"--tf32 on device {args.device}: TF32 is a format of CUDA GPUs; leave the flag out")
    args.run_dir = args.resume or getattr(args, "run_dir", None)
    if args.batch_size % processes.world_size():
        raise UsageError(
            f"--batch_size {args.batch_size} cannot be divided among {processes.world_size()} processes; "
            "give a multiple of their number"
        )
    resolve_optimizer(args)
    _resolve_precision(args)
    return args


def make_args(script: str, **options: bool | int | float | str | Path | None) -> argparse.Namespace:
    """What `set_up` and `fit` need to know, without a command line: the options of the trainer `script`.

    `script` is "main", "main_fp16_optimizer" or "main_amp", and says which precision options there are; `options` are
    named as the flags, with "_" for "-". All others have their defaults.

    Raises:
        UsageError: there is no such script or option, or as for `parse_args`.
    """
    if script not in SCRIPTS:
        raise UsageError(f"script is {script!r}; allowed are {', '.join(SCRIPTS)}")
    return parse_args(script, None, to_flags(make_parser(script, None), options))


def _resolve_precision(args: argparse.Namespace) -> None:
    if args.script == "main_amp":
        asked = getattr(args, "dtype", None)
        if args.fp16 and asked not in (None, "float16"):
            raise UsageError(f"--fp16 and --dtype {asked} contradict each other: give one of them")
        args.dtype = asked or "float16"
        args.mode = args.dtype
        default = None if args.dtype == "float16" else 1.0
    else:
        args.dtype = "float16" if args.fp16 else "float32"
        args.mode = "fp16" if args.fp16 else "fp32"
        default = FP16_STATIC_LOSS_SCALE if args.fp16 else 1.0
    args.static_loss_scale = getattr(args, "static_loss_scale", default)
    if args.script == "main_fp16_optimizer":
        if args.dynamic_loss_scale:
            args.static_loss_scale = None
        args.mode += "-dynamic" if args.dynamic_loss_scale else "-static"


def set_up(args: argparse.Namespace) -> None:
    """Meet the other processes of the run, seed every generator, and set what torch keeps per process.

    That is determinism, and TF32 on or off.
    """
    distributed.init_process_group(args.device)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this set only
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    if args.device.startswith("cuda"):
        set_tf32(args.tf32)
