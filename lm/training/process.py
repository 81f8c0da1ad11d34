"""The set-up of a process of a run, before all else."""

import os

import torch

from lm.options.options import Options
from lm.training import distributed
from roundoff.device import keep_freed_memory, set_tf32


def set_up(args: Options) -> None:
    """Meet the other processes of the run, seed every generator, and set what torch keeps per process.

    That is determinism, and TF32 on or off.
    """
    distributed.init_process_group(args.device)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this set only
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    if args.device.startswith("cuda"):
        set_tf32(args.tf32)
