"""Has the interface of apex.parallel on any device: data parallelism, synchronized batch norm, LARC.

See apex_compat/README.md.
"""

import torch.distributed as dist

from apex_compat.parallel.convert import convert_syncbn_model, create_syncbn_process_group
from apex_compat.parallel.distributed import DistributedDataParallel, Reducer
from apex_compat.parallel.LARC import LARC
from apex_compat.parallel.sync_batchnorm import SyncBatchNorm

if dist.is_available():  # some builds of torch have no distributed package
    from torch.distributed import ReduceOp

__all__ = [
    "LARC",
    "DistributedDataParallel",
    "ReduceOp",
    "Reducer",
    "SyncBatchNorm",
    "convert_syncbn_model",
    "create_syncbn_process_group",
]
