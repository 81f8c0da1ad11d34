"""Gives a model synchronized batch norms, and the processes groups to synchronize in."""

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apex_compat.parallel.sync_batchnorm import SyncBatchNorm


def convert_syncbn_model(
    module: nn.Module, process_group: "dist.ProcessGroup | None" = None, channel_last: bool = False
) -> nn.Module:
    """Replace the batch norms in `module` by `SyncBatchNorm`, and return it, or its replacement if it is one.

    The new layers have the parameters and running statistics of the old ones, the same tensors, so an optimizer
    made before still has them. Instance norms stay.

    Args:
        module: changed in place.
        process_group: as `SyncBatchNorm` takes it.
        channel_last: as `SyncBatchNorm` takes it.
    """
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = convert_syncbn_model(child, process_group, channel_last)
    if not isinstance(module, _BatchNorm):
        return module
    new = SyncBatchNorm(
        module.num_features,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
        process_group,
        channel_last,
        fuse_relu=getattr(module, "fuse_relu", False),
    )
    new._parameters.update(module._parameters)
    new._buffers.update(module._buffers)
    return new.train(module.training)


def create_syncbn_process_group(group_size: int) -> "dist.ProcessGroup | None":
    """Return this process's group of `group_size` consecutive ranks, or None, which means all, for 0.

    Every process must call it, since all of them make every group.

    Raises:
        ValueError: `group_size` does not divide the number of processes.
    """
    if group_size == 0:
        return None
    ranks = dist.get_world_size()
    if group_size < 0 or ranks % group_size:
        raise ValueError(f"group_size is {group_size}; it must be 0 or divide the number of processes, {ranks}")
    groups = [dist.new_group(range(first, first + group_size)) for first in range(0, ranks, group_size)]
    group: dist.ProcessGroup = groups[dist.get_rank() // group_size]
    return group
