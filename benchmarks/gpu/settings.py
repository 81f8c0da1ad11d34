"""What every part is told."""

from dataclasses import dataclass
from pathlib import Path

from lm.data import corpora

LINES = {"train": 100, "valid": 20, "test": 20}
"""How much of each text a CPU is given."""


@dataclass(frozen=True)
class Settings:
    """Says where the parts run and write.

    Attributes:
        out: folder of the reports.
        device: "cpu", or a CUDA GPU as torch names it.
        data: the corpus, as `--data` of the trainers takes it.
        scratch: folder that goes at the end.
    """

    out: Path
    device: str
    data: str
    scratch: Path

    @property
    def small(self) -> bool:
        """Return whether sizes must be small, since this is no GPU."""
        return not self.device.startswith("cuda")


def short_corpus(data: str, folder: Path) -> str:
    """Make a corpus of the first lines of `data` in `folder`; return the folder."""
    texts = corpora.read(data)
    folder.mkdir()
    for split, lines in LINES.items():
        first = [line for line in getattr(texts, split).splitlines(keepends=True) if line.strip()][:lines]
        (folder / f"{split}.txt").write_text("".join(first), encoding="utf-8")
    return str(folder)
