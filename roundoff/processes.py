"""The place of this process in a run of several, as torchrun says it in the environment."""

import os

import torch.distributed as dist


def world_size() -> int:
    """Return how many processes share this run."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """Return the number of this process among them. Number 0 writes the records and speaks."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def local_rank() -> int:
    """Return the number of this process among those on this machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0


def local_world_size() -> int:
    """Return how many processes of this run are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
