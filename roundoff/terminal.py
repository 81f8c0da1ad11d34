"""What a run shows on the terminal."""

from tqdm import tqdm

from roundoff import processes


def say(line: str) -> None:
    """Print one line on stdout, above the progress bar where there is one; in a distributed run, on rank 0."""
    if processes.rank() > 0:
        return
    with tqdm.external_write_mode():
        print(line, flush=True)


def progress_bar(batches: range, text: str, done: int = 0, total: int | None = None) -> "tqdm[int]":
    """`batches` with a bar on stderr, where that is a terminal; `done` of `total` lie behind already."""
    hidden = None if processes.rank() == 0 else True
    total = total or len(batches)
    return tqdm(batches, desc=text, unit="batch", leave=False, disable=hidden, initial=done, total=total)
