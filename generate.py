"""Write text from a model that any of the trainers saved."""

# PYTHON_ARGCOMPLETE_OK
import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.options.device_flags import add_device_options, device_of
from roundoff.cli import HelpFormatter, OneLineParser, add_version, complete, number, whole
from roundoff.errors import UsageError, printable
from roundoff.program import exit_code
from roundoff.runs.files import check_writable, write_atomically

WORDS_A_LINE = 20


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add_version(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("model.safetensors"),
        metavar="FILE",
        help="what --save wrote, or a run directory, for its best model",
    )
    parser.add_argument(
        "--outf", default="generated.txt", metavar="FILE", help="the text goes here; - for the terminal, word by word"
    )
    parser.add_argument("--words", type=whole, default=1000, metavar="N", help="how many to write")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1111, help="of the random choice")
    parser.add_argument(
        "--temperature",
        type=number(float, 1e-3),
        default=1.0,
        help="of at least 0.001; higher is more diverse, lower more predictable",
    )
    add_device_options(parser)
    parser.add_argument("--log-interval", type=whole, default=100, metavar="N", help="words between two lines")
    complete(parser)
    return parser.parse_args()


def as_text(words: Iterable[str]) -> Iterator[str]:
    """Yield `words` in pieces of text as they come: separated by spaces, `WORDS_A_LINE` a line."""
    column = 0
    for word in words:
        yield f" {word}" if column else word
        column = (column + 1) % WORDS_A_LINE
        if column == 0:
            yield "\n"
    if column:
        yield "\n"


def show(text: Iterable[str]) -> None:
    """Print each piece at once; what the terminal's encoding lacks as an escape."""
    encoding = sys.stdout.encoding or "utf-8"
    for piece in text:
        sys.stdout.write(piece.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


def with_progress(words: Iterable[str], count: int, log_interval: int) -> Iterator[str]:
    """Yield `words`, of which there are `count`; print a line after each `log_interval` of them."""
    from roundoff.terminal import say

    for i, word in enumerate(words, 1):
        if i % log_interval == 0:
            say(f"| Generated {i}/{count} words")
        yield word


def main() -> int:
    """Load, draw, write."""
    args = parse_args()
    device = device_of(args.device, cuda=args.cuda, accel=args.accel)
    if args.outf != "-":
        if os.path.realpath(args.outf) == os.path.realpath(args.checkpoint):
            raise UsageError(f"--outf and --checkpoint are both {args.outf}; give the text a file of its own")
        check_writable("--outf", Path(args.outf))
    import torch  # here, since it takes seconds, which --help and a mistake do not have

    from lm.launch.best_model import load_best
    from lm.model.generation import generate
    from roundoff.device import forbid_reduced_precision_reductions, set_tf32
    from roundoff.terminal import say

    if device.startswith("cuda"):
        set_tf32(False)  # cuDNN's default, which would soon choose other words than a CPU
        forbid_reduced_precision_reductions()
    model, vocabulary = load_best(args.checkpoint)
    torch.manual_seed(args.seed)
    model.eval().to(device)
    words = (vocabulary[i] for i in generate(model, args.words, args.temperature, len(vocabulary)))
    if args.outf == "-":
        show(as_text(map(printable, words)))  # a model file may come from anywhere
        return 0
    text = "".join(as_text(with_progress(words, args.words, args.log_interval)))
    write_atomically(Path(args.outf), lambda file: file.write(text.encode()))
    say(f"| {args.words} words are in {printable(args.outf)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
