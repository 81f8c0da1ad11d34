"""Every flag and every default of the three trainers, once."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lm import distributed
from lm.cli import HelpFormatter, OneLineParser, Switch, add_version, complete, finite_above_0, number, whole
from lm.command_line import MAY_CHANGE, is_for_sacred, read_flags, run_sacred
from lm.corpora import BUILT_IN, DEFAULT
from lm.device import find_accelerator, find_device, keep_freed_memory, set_tf32
from lm.errors import UsageError
from lm.model import KINDS, check_model_flags
from lm.optimizers import DEFAULT_LR, resolve_optimizer

FP16_STATIC_LOSS_SCALE = 128.0
DTYPES = ("float16", "bfloat16", "float32")


# Bounded so that fp32 holds its reciprocal too.
loss_scale = number(float, 2.0**-100, 2.0**127, what="a number above 0, from 2**-100 to 2**127")


def make_parser(script: str, description: str | None) -> OneLineParser:
    """The command line of the trainer `script`, such as "main_amp".

    An option added here is one of the shell, of a --config file, of Sacred and of config.json.
    """
    parser = OneLineParser(
        prog=f"{script}.py",
        description=description,
        epilog=f"With Sacred: {script}.py [COMMAND] [with NAME=VALUE...] [-F DIR], where COMMAND is print_config, "
        f"save_config, print_dependencies or none to train; {script}.py help shows them all.",
        allow_abbrev=False,  # an abbreviation of today is ambiguous with the next new flag
        formatter_class=HelpFormatter,
    )
    add_version(parser)
    parser.add_argument(
        "--config",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE.toml",
        help="take options from there, such as batch-size = 32 or tied = true; the command line wins",
    )
    _add_data(parser)
    _add_model(parser)
    _add_training(parser)
    _add_precision(parser, script)
    _add_records(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default=DEFAULT,
        metavar="FOLDER",
        help="folder with train.txt, valid.txt and test.txt; the default one is fetched where it is missing; "
        f"{BUILT_IN} is text that comes with Python",
    )
    group.add_argument(
        "--batch_size", "--batch-size", type=whole, default=20, metavar="COLUMNS", help="columns of text side by side"
    )
    group.add_argument("--bptt", type=whole, default=35, metavar="WORDS", help="words that gradients flow back through")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="LSTM", choices=KINDS, help="kind of layer")
    group.add_argument("--emsize", type=whole, default=200, metavar="UNITS", help="size of the word embeddings")
    group.add_argument("--nhid", type=whole, default=200, metavar="UNITS", help="hidden units a layer")
    group.add_argument(
        "--nlayers", type=whole, default=2, metavar="LAYERS", help="layers between embedding and decoder"
    )
    group.add_argument(
        "--nhead", type=whole, default=2, metavar="HEADS", help="of the attention; only a Transformer has them"
    )
    group.add_argument(
        "--dropout",
        type=number(float, 0, 1, below=True),
        default=0.2,
        metavar="PROBABILITY",
        help="probability of dropping a unit in training",
    )
    group.add_argument("--tied", action=Switch, help="share the embedding with the decoder")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--optimizer",
        choices=tuple(DEFAULT_LR),
        default=argparse.SUPPRESS,
        help="plain SGD, or AdamW with its weight decay of 0.01 (default: sgd)",
    )
    group.add_argument("--use-optimizer", action=Switch, help="the same as --optimizer adamw")
    group.add_argument(
        "--lr",
        type=finite_above_0,
        default=argparse.SUPPRESS,
        metavar="RATE",
        help=f"initial learning rate (default: {', '.join(f'{lr:g} for {name}' for name, lr in DEFAULT_LR.items())})",
    )
    group.add_argument(
        "--clip",
        type=number(float, 0, above=True),
        default=0.25,
        metavar="NORM",
        help="largest L2 norm of all gradients together; inf for no clipping",
    )
    group.add_argument(
        "--epochs", type=whole, default=40, metavar="EPOCHS", help="passes over the training text, at most"
    )
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=1111, metavar="NUMBER", help="seed of every random number"
    )
    group.add_argument("--max-steps", type=whole, metavar="STEPS", help="stop after this many batches, then evaluate")
    group.add_argument(
        "--dry-run",
        action=Switch,
        help="one batch of training and of each evaluation, to see that all works",
    )
    group.add_argument(
        "--max-skipped",
        type=whole,
        default=50,
        metavar="STEPS",
        help="give up after this many steps in a row with a non-finite loss or gradient",
    )
    group.add_argument("--cuda", action=Switch, help="the same as --device cuda")
    group.add_argument("--accel", action=Switch, help="run on this machine's accelerator: CUDA, XPU or MPS")
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:N, xpu or mps (default: cpu)", default=argparse.SUPPRESS
    )
    group.add_argument("--deterministic", action=Switch, help="allow no operation that can differ between runs")


def _add_precision(parser: argparse.ArgumentParser, script: str) -> None:
    group = parser.add_argument_group("precision")
    amp = script == "main_amp"
    group.add_argument(
        "--fp16",
        action=Switch,
        help="the same as --dtype float16" if amp else "train with half weights",
    )
    if amp:
        group.add_argument(
            "--dtype",
            choices=DTYPES,
            default=argparse.SUPPRESS,
            help="of products under autocast; float32 means no autocast (default: float16)",
        )
    if script == "main_fp16_optimizer":
        group.add_argument("--dynamic-loss-scale", action=Switch, help="supersedes --static-loss-scale")
        group.add_argument(
            "--fp16-utils", choices=("own", "apex"), default="own", help="this project's, or an old apex's"
        )
    static_default = "dynamic in float16, else 1" if amp else f"{FP16_STATIC_LOSS_SCALE:g} with --fp16, else 1"
    group.add_argument(
        "--static-loss-scale",
        type=loss_scale,
        metavar="FACTOR",
        default=argparse.SUPPRESS,
        help=f"factor that the loss is multiplied by; powers of two are exact (default: {static_default})",
    )
    group.add_argument(
        "--init-scale",
        type=loss_scale,
        default=2.0**16,
        metavar="FACTOR",
        help="a dynamic loss scale starts here",
    )
    group.add_argument(
        "--scale-window",
        type=whole,
        default=2000,
        metavar="STEPS",
        help="a dynamic loss scale doubles after this many steps in a row without overflow",
    )
    group.add_argument("--tf32", action=Switch, help="let a GPU round fp32 products to TF32 (CUDA only)")


def _add_records(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("records")
    group.add_argument(
        "--log-interval",
        type=whole,
        default=200,
        metavar="BATCHES",
        help="batches from one line of the log to the next",
    )
    group.add_argument("--save", type=Path, default=Path("model.pt"), metavar="FILE", help="the best model goes here")
    group.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="records of this run go here (default: runs/<script>-<mode>-<time>)",
    )
    group.add_argument(
        "--checkpoint-interval",
        type=whole,
        metavar="STEPS",
        help="write checkpoint.pt after this many steps too, not only after each epoch and when the run is stopped",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="go on with the run recorded there, from its last checkpoint and with its flags; flags given again must "
        f"agree, but for --{', --'.join(name.replace('_', '-') for name in MAY_CHANGE)}",
    )


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
    check_model_flags(args)
    device = getattr(args, "device", None)
    args.device = find_accelerator(device, cuda=args.cuda) if args.accel else find_device(device, cuda=args.cuda)
    if args.device == "cuda" and distributed.world_size() > 1:
        args.device = find_device(f"cuda:{distributed.local_rank()}")
    if args.tf32 and not args.device.startswith("cuda"):
        raise UsageError(f"--tf32 on device {args.device}: TF32 is a format of CUDA GPUs; leave the flag out")
    args.run_dir = args.resume or getattr(args, "run_dir", None)
    if args.batch_size % distributed.world_size():
        raise UsageError(
            f"--batch_size {args.batch_size} cannot be divided among {distributed.world_size()} processes; "
            "give a multiple of their number"
        )
    resolve_optimizer(args)
    _resolve_precision(args)
    return args


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
    distributed.join(args.device)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this set only
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    if args.device.startswith("cuda"):
        set_tf32(args.tf32)
