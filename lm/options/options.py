"""Every flag and every default of the three trainers, once."""

import argparse
from pathlib import Path

from lm.data.corpora import BUILT_IN, DEFAULT
from lm.model.language_model import KINDS
from lm.options.command_line import MAY_CHANGE
from lm.options.device import add_device_options
from lm.options.optimizers import DEFAULT_LR, TRANSFORMER_LR
from roundoff.cli import HelpFormatter, OneLineParser, Switch, add_version, finite_above_0, number, whole

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
        help=f"initial learning rate (default: {DEFAULT_LR['sgd']:g} for sgd, {TRANSFORMER_LR:g} if it trains a "
        f"Transformer; {DEFAULT_LR['adamw']:g} for adamw)",
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
    add_device_options(group)
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
    group.add_argument(
        "--tensorboard",
        action=Switch,
        help="write event files into the run directory too, for tensorboard --logdir runs",
    )
    group.add_argument(
        "--save", type=Path, default=Path("model.safetensors"), metavar="FILE", help="the best model goes here"
    )
    group.add_argument(
        "--onnx-export",
        type=Path,
        metavar="FILE",
        help="write it as ONNX too, with the same weights in fp32, checked with onnxruntime against the model itself",
    )
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
        help="write a checkpoint after this many steps too, not only after each epoch and when the run is stopped",
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="go on with the run recorded there, from its last checkpoint and with its flags; flags given again must "
        f"agree, but for --{', --'.join(name.replace('_', '-') for name in MAY_CHANGE)}",
    )
