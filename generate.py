"""Write text from a model that any of the trainers saved."""

# PYTHON_ARGCOMPLETE_OK
import argparse
import sys
from pathlib import Path

import torch

from lm.checkpoint import load_model
from lm.cli import HelpFormatter, OneLineParser, add_version, complete, number, whole
from lm.console import say
from lm.device import find_device
from lm.errors import UsageError, exit_code
from lm.files import check_writable, write_atomically
from lm.model import RNNModel

WORDS_A_LINE = 20


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add_version(parser)
    parser.add_argument("--checkpoint", type=Path, default=Path("model.pt"), metavar="FILE", help="what --save wrote")
    parser.add_argument("--outf", type=Path, default=Path("generated.txt"), metavar="FILE", help="the text goes here")
    parser.add_argument("--words", type=whole, default=1000, metavar="N", help="how many to write")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1111, help="of the random choice")
    parser.add_argument(
        "--temperature",
        type=number(float, 1e-3),
        default=1.0,
        help="of at least 0.001; higher is more diverse, lower more predictable",
    )
    parser.add_argument("--cuda", action="store_true", help="run on a GPU")
    parser.add_argument("--log-interval", type=whole, default=100, metavar="N", help="words between two lines")
    complete(parser)
    return parser.parse_args()


@torch.no_grad()
def generate(model: RNNModel, words: int, temperature: float, log_interval: int, vocabulary_size: int) -> list[int]:
    """Draw ids of `words` words, each from softmax(logits / temperature) after all before it; the first at random.

    Ids from `vocabulary_size` on only pad the decoder to a round size, and are never drawn.

    Raises:
        UsageError: the model's scores are not finite.
    """
    device = model.decoder.weight.device
    hidden = model.init_hidden(1)
    context = model.options.get("context", 1)  # recurrent layers remember the words before the last
    token = torch.randint(vocabulary_size, (1, 1))  # drawn on the CPU, so that every device draws the same
    tokens = token
    ids = []
    for i in range(1, words + 1):
        logits, hidden = model(tokens.to(device), hidden)
        scores = logits[-1, 0, :vocabulary_size].double().cpu()
        if not scores.isfinite().all():
            raise UsageError(f"--checkpoint: the model's scores of word {i} are not finite numbers; train it again")
        probabilities = torch.softmax(scores / temperature, dim=0)
        token = torch.multinomial(probabilities, 1).view(1, 1)
        tokens = torch.cat((tokens, token))[-context:]
        ids.append(int(token))
        if i % log_interval == 0:
            say(f"| Generated {i}/{words} words")
    return ids


def as_text(words: list[str]) -> str:
    """`words` separated by spaces, `WORDS_A_LINE` a line."""
    lines = [words[i : i + WORDS_A_LINE] for i in range(0, len(words), WORDS_A_LINE)]
    return "".join(" ".join(line) + "\n" for line in lines)


def main() -> int:
    """Load, draw, write."""
    args = parse_args()
    device = find_device(None, cuda=args.cuda)
    check_writable("--outf", args.outf)
    model, vocabulary = load_model(args.checkpoint)
    torch.manual_seed(args.seed)
    model.eval().to(device)
    ids = generate(model, args.words, args.temperature, args.log_interval, len(vocabulary))
    text = as_text([vocabulary[i] for i in ids])
    write_atomically(args.outf, lambda file: file.write(text.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
