"""Every flag and every default of the three trainers, once."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from lm.corpora import BUILT_IN, DEFAULT
from lm.device import find_device, keep_freed_memory, set_tf32
from lm.errors import UsageError
from lm.model import KINDS

FP16_STATIC_LOSS_SCALE = 128.0
DTYPES = ("float16", "bfloat16", "float32")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(
    kind: Callable[[str], float],
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    what: str | None = None,
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` in [low, high]; `above` and `below` leave the ends out.

    `what` describes it in the error where the bounds would only be digits to the reader.
    """
    if what is None:
        what = f"a{' whole' if kind is int else ''} number {'above' if above else 'of at least'} {low:g}"
        if high < math.inf:
            what += f" and {'below' if below else 'at most'} {high:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_low = value <= low if above else value < low
        too_high = value >= high if below else value > high
        if math.isnan(value) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


whole = number(int, 1)
finite_above_0 = number(float, 0, 1e38, above=True)
# Bounded so that fp32 holds its reciprocal too.
loss_scale = number(float, 2.0**-100, 2.0**127, what="a number above 0, from 2**-100 to 2**127")


def make_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of the trainer `script`, such as "main_amp"."""
    parser = OneLineParser(
        prog=f"{script}.py",
        description=description,
        allow_abbrev=False,  # an abbreviation of today is ambiguous with the next new flag
        formatter_class=HelpFormatter,
    )
    _add_data_and_model(parser)
    _add_training(parser)
    _add_precision(parser, script)
    _add_records(parser)
    return parser


def _add_data_and_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    group.add_argument(
        "--data",
        default=DEFAULT,
        help="folder with train.txt, valid.txt and test.txt; the default one is fetched where it is missing; "
        f"{BUILT_IN} is text that comes with Python",
    )
    group.add_argument("--model", default="LSTM", choices=KINDS, help="kind of recurrent layer")
    group.add_argument("--emsize", type=whole, default=200, help="size of the word embeddings")
    group.add_argument("--nhid", type=whole, default=200, help="hidden units a layer")
    group.add_argument("--nlayers", type=whole, default=2, help="recurrent layers")
    group.add_argument(
        "--dropout", type=number(float, 0, 1, below=True), default=0.2, help="probability of dropping a unit"
    )
    group.add_argument("--tied", action="store_true", help="share the embedding with the decoder")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=finite_above_0, default=20.0, help="initial learning rate (SGD)")
    group.add_argument(
        "--clip",
        type=number(float, 0, above=True),
        default=0.25,
        help="largest L2 norm of all gradients together; inf for no clipping",
    )
    group.add_argument("--epochs", type=whole, default=40, help="passes over the training text, at most")
    group.add_argument("--batch_size", "--batch-size", type=whole, default=20, help="columns of text side by side")
    group.add_argument("--bptt", type=whole, default=35, help="words that gradients flow back through")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1111, help="of every random number")
    group.add_argument("--max-steps", type=whole, metavar="N", help="stop after N batches, then evaluate")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="one batch of training and of each evaluation, to see that all works",
    )
    group.add_argument(
        "--max-skipped",
        type=whole,
        default=50,
        metavar="N",
        help="give up after N steps in a row with a non-finite loss or gradient",
    )
    group.add_argument("--cuda", action="store_true", help="the same as --device cuda")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cpu)", default=argparse.SUPPRESS)
    group.add_argument("--deterministic", action="store_true", help="allow no operation that can differ between runs")


def _add_precision(parser: argparse.ArgumentParser, script: str) -> None:
    group = parser.add_argument_group("precision")
    amp = script == "main_amp"
    group.add_argument(
        "--fp16",
        action="store_true",
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
        group.add_argument("--dynamic-loss-scale", action="store_true", help="supersedes --static-loss-scale")
        group.add_argument(
            "--fp16-utils", choices=("own", "apex"), default="own", help="this project's, or an old apex's"
        )
    static_default = "dynamic in float16, else 1" if amp else f"{FP16_STATIC_LOSS_SCALE:g} with --fp16, else 1"
    group.add_argument(
        "--static-loss-scale",
        type=loss_scale,
        metavar="S",
        default=argparse.SUPPRESS,
        help=f"factor that the loss is multiplied by; powers of two are exact (default: {static_default})",
    )
    group.add_argument(
        "--init-scale",
        type=loss_scale,
        default=2.0**16,
        metavar="S",
        help="a dynamic loss scale starts here",
    )
    group.add_argument(
        "--scale-window",
        type=whole,
        default=2000,
        metavar="N",
        help="a dynamic loss scale doubles after N steps in a row without overflow",
    )
    group.add_argument("--tf32", action="store_true", help="let a GPU round fp32 products to TF32 (CUDA only)")


def _add_records(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("records")
    group.add_argument("--log-interval", type=whole, default=200, metavar="N", help="batches between two lines")
    group.add_argument("--save", type=Path, default=Path("model.pt"), metavar="FILE", help="the best model goes here")
    group.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="records of this run go here (default: runs/<script>-<mode>-<time>)",
    )


def parse_args(script_file: str, description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line of the trainer `script_file` (its `__file__`, and its `__doc__` for --help).

    Beside the flags the result has `script`, `mode` (which precision management, in a word or two), `dtype`
    ("float16", "bfloat16", "float32") and `static_loss_scale` resolved (None: dynamic).

    Raises:
        UsageError: flags that contradict each other, or a device that is not there.
        SystemExit: 2 after a value that no flag takes, 0 after --help.
    """
    script = Path(script_file).stem
    args = make_parser(script, description).parse_args(argv)
    args.script = script
    if args.tied and args.emsize != args.nhid:
        raise UsageError(
            f"--tied with --emsize {args.emsize} and --nhid {args.nhid}: tied weights need both to be equal"
        )
    args.device = find_device(getattr(args, "device", None), cuda=args.cuda)
    if args.tf32 and not args.device.startswith("cuda"):
        raise UsageError(f"--tf32 on device {args.device}: TF32 is a format of CUDA GPUs; leave the flag out")
    args.run_dir = getattr(args, "run_dir", None)
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
    """Seed every generator and set what torch keeps per process: determinism, and TF32 on or off."""
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this set only
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    if args.device.startswith("cuda"):
        set_tf32(args.tf32)
