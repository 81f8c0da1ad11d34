"""Says what serves instead of those parts of apex that this package does not have."""

INSTEAD = {
    "contrib": "NVIDIA's apex, which keeps contrib and its kernels",
    "contrib.bottleneck": "torchvision.models.resnet.Bottleneck",
    "contrib.clip_grad": "torch.nn.utils.clip_grad_norm_",
    "contrib.conv_bias_relu": "torch.nn.functional.conv2d and relu",
    "contrib.cudnn_gbn": "apex.parallel.SyncBatchNorm",
    "contrib.focal_loss": "torchvision.ops.sigmoid_focal_loss",
    "contrib.fmha": "torch.nn.functional.scaled_dot_product_attention",
    "contrib.gpu_direct_storage": "torch.cuda.gds",
    "contrib.group_norm": "torch.nn.GroupNorm",
    "contrib.groupbn": "apex.parallel.SyncBatchNorm",
    "contrib.index_mul_2d": "in1[index] * in2",
    "contrib.layer_norm": "apex.normalization.FusedLayerNorm",
    "contrib.multihead_attn": "torch.nn.functional.scaled_dot_product_attention",
    "contrib.nccl_allocator": "torch.cuda.MemPool",
    "contrib.openfold_triton": "torch.nn.functional.scaled_dot_product_attention and layer_norm",
    "contrib.optimizers": "apex.optimizers; for its FP16_Optimizer, apex.fp16_utils.FP16_Optimizer",
    "contrib.optimizers.distributed_fused_adam": "torch.distributed.optim.ZeroRedundancyOptimizer",
    "contrib.optimizers.distributed_fused_lamb": "apex.optimizers.FusedLAMB, with DistributedDataParallel",
    "contrib.sparsity": "torch.sparse.to_sparse_semi_structured",
    "contrib.transducer": "torchaudio.functional.rnnt_loss",
    "contrib.xentropy": "torch.nn.functional.cross_entropy, whose label_smoothing is smoothing",
    "pyprof": "torch.profiler",
    "reparameterization": "torch.nn.utils.parametrizations.weight_norm",
    "transformer": "Megatron-Core (megatron.core)",
}
"""Module of apex -> what to use. A module within one has the line of the nearest."""


def why_not(name: str) -> str | None:
    """Return one line that says that `name` is not offered and what to use, or None if it is not in the table.

    Args:
        name: a module or an attribute as scripts write it, "apex.contrib.xentropy.SoftmaxCrossEntropyLoss".
    """
    parts = name.removeprefix("apex.").split(".")
    for length in range(len(parts), 0, -1):
        nearest = ".".join(parts[:length])
        if nearest in INSTEAD:
            return f"apex.{'.'.join(parts)} is not offered: use {INSTEAD[nearest]}"
    return None


def refuse(name: str) -> None:
    """Raise ModuleNotFoundError with the line of `why_not`, if there is one.

    Scripts that fall back where an import of apex fails do so here too: it is an ImportError. It does not carry the
    name of the module, or `from apex import contrib` would drop it and raise a line of its own.
    """
    line = why_not(name)
    if line is not None:
        raise ModuleNotFoundError(line)
