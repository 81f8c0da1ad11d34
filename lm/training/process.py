"""The set-up of a process of a run, before all else."""

import os

import torch

from lm.options.options import Options
from lm.training import distributed
from roundoff.device import device_name, forbid_reduced_precision_reductions, keep_freed_memory, set_tf32
from roundoff.errors import UsageError


def set_up(args: Options) -> None:
    """Meet the other processes of the run, seed every generator, and set what torch keeps per process.

    That is determinism, the current GPU, TF32 on or off, and sums of half products in fp32.

    Raises:
        UsageError: torch was built without code for this GPU.
    """
    distributed.init_process_group(args.device)
    torch.manual_seed(args.seed)
    if args.deterministic:
        # cuBLAS is deterministic with this set only. cuDNN's recurrent layers allow :16:8 too, but not :4096:8.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True)
        # Nothing here reads what it has not written, and the logits are 93 MB.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()
    if args.device.startswith("cuda"):
        if torch.device(args.device).index is not None:
            torch.cuda.set_device(args.device)  # which Triton and others look at
        _check_code_for(args.device)
        set_tf32(args.tf32)
        forbid_reduced_precision_reductions()


def _check_code_for(gpu: str) -> None:
    """Raise UsageError unless a kernel of torch runs on `gpu`."""
    try:
        torch.zeros(1, device=gpu)
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        raise UsageError(
            f"{device_name(gpu)}: this torch ({torch.__version__}) has no code for it; install a build of torch that "
            "has, or leave the flag of the device out"
        ) from None
