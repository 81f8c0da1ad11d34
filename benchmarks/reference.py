"""The reference of all measurements: the loop of the PyTorch tutorial for language models, written afresh.

fp32, `log_softmax` in the model, `NLLLoss`, `clip_grad_norm_`, the update as `p.data.add_(p.grad, alpha=-lr)`,
`loss.item()` after every step, a corpus read line by line.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.data.corpora import SPLITS
from lm.data.corpus import get_batch

EOS = "<eos>"


def read(folder: str) -> tuple[list[Tensor], int]:
    """Return train, valid and test as token ids, and the number of words.

    Two passes over each file: one numbers the words, one makes a list of ids and a tensor for each line.
    """
    numbers: dict[str, int] = {}
    texts = []
    for split in SPLITS:
        path = Path(folder, f"{split}.txt")
        with path.open(encoding="utf8") as lines:
            for line in lines:
                for word in [*line.split(), EOS]:
                    if word not in numbers:
                        numbers[word] = len(numbers)
        with path.open(encoding="utf8") as lines:
            tensors = []
            for line in lines:
                ids = []
                for word in [*line.split(), EOS]:
                    ids.append(numbers[word])
                tensors.append(torch.tensor(ids, dtype=torch.int64))
        texts.append(torch.cat(tensors))
    return texts, len(numbers)


class Model(nn.Module):
    """Embedding, LSTM, decoder and log_softmax."""

    def __init__(self, vocabulary: int, size: int, layers: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary, size)
        self.rnn = nn.LSTM(size, size, layers, dropout=dropout if layers > 1 else 0.0)  # else torch warns
        self.decoder = nn.Linear(size, vocabulary)
        self.vocabulary, self.size, self.layers = vocabulary, size, layers
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return zeros for h and c."""
        weight = next(self.parameters())
        shape = (self.layers, batch_size, self.size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def forward(self, tokens: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the log probabilities of each next word, shape (bptt * batch, vocabulary), and the new state."""
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, self.vocabulary)
        return F.log_softmax(decoded, dim=1), hidden


class Trainer:
    """The model and its training loop, a step at a time.

    Args:
        data: int64, shape (rows, batch size), as `batchify` cuts it; the model goes to its device.
        vocabulary: number of words.
        size: of the embedding and of each hidden layer.
        bptt: rows a step.
        layers: of the LSTM.
    """

    def __init__(self, data: Tensor, vocabulary: int, size: int, bptt: int = 35, layers: int = 2) -> None:
        torch.manual_seed(1111)
        self.data, self.bptt = data, bptt
        self.lr, self.clip = 20.0, 0.25
        self.model = Model(vocabulary, size, layers).to(data.device)
        self.criterion = nn.NLLLoss()
        self.hidden = self.model.init_hidden(data.size(1))
        self.total_loss = 0.0

    def gradients(self, i: int) -> Tensor:
        """Run forward and backward of the batch at row `i`; return the loss."""
        tokens, targets = get_batch(self.data, i, self.bptt)
        self.model.zero_grad()
        self.hidden = (self.hidden[0].detach(), self.hidden[1].detach())
        output, self.hidden = self.model(tokens, self.hidden)
        loss: Tensor = self.criterion(output, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def update(self) -> None:
        """Clip and update."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for p in self.model.parameters():
            assert p.grad is not None
            p.data.add_(p.grad, alpha=-self.lr)

    def update_and_clear(self) -> None:
        """Do what a step does outside forward and backward."""
        self.update()
        self.model.zero_grad()

    def step(self, i: int) -> None:
        """Take one training step."""
        self.model.train()
        loss = self.gradients(i)
        self.update()
        self.total_loss += loss.item()

    @torch.no_grad()
    def evaluate(self, source: Tensor) -> float:
        """Return the mean loss over `source`, shape (rows, columns)."""
        self.model.eval()
        total = 0.0
        hidden = self.model.init_hidden(source.size(1))
        for i in range(0, len(source) - 1, self.bptt):
            tokens, targets = get_batch(source, i, self.bptt)
            output, hidden = self.model(tokens, hidden)
            total += len(tokens) * self.criterion(output, targets).item()
        return total / (len(source) - 1)
