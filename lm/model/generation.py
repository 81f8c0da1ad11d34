"""Draw words from a model, one by one."""

from collections.abc import Iterator

import torch

from lm.model.language_model import RNNModel
from roundoff.errors import UsageError


@torch.no_grad()
def generate(model: RNNModel, words: int, temperature: float, vocabulary_size: int) -> Iterator[int]:
    """Draw the ids of `words` words, each from softmax(logits / temperature) after all before it; the first at random.

    Ids from `vocabulary_size` on only pad the decoder to a round size, and are never drawn.

    Raises:
        UsageError: the model's scores are not finite.
    """
    device = model.decoder.weight.device
    hidden = model.init_hidden(1)
    context = model.options.get("context", 1)  # recurrent layers remember the words before the last
    token = torch.randint(vocabulary_size, (1, 1))  # drawn on the CPU, so that every device draws the same
    tokens = token
    for i in range(1, words + 1):
        logits, hidden = model(tokens.to(device), hidden)
        scores = logits[-1, 0, :vocabulary_size].double().cpu()
        if not scores.isfinite().all():
            raise UsageError(f"--checkpoint: the model's scores of word {i} are not finite numbers; train it again")
        probabilities = torch.softmax(scores / temperature, dim=0)
        token = torch.multinomial(probabilities, 1).view(1, 1)
        tokens = torch.cat((tokens, token))[-context:]
        yield int(token)
