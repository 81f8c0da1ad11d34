"""The place of this process in a run of several, as torchrun says it in the environment."""

import os


def launched() -> bool:
    """Return whether torchrun started this process, as `torch.distributed` finds out, but without the import."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """Return how many processes share this run."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """Return the number of this process among them. Number 0 writes the records and speaks."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Return the number of this process among those on this machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_world_size() -> int:
    """Return how many processes of this run are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
