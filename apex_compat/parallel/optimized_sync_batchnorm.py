"""Gives `SyncBatchNorm` under the name of the module where apex had its compiled one."""

from apex_compat.parallel.sync_batchnorm import SyncBatchNorm

__all__ = ["SyncBatchNorm"]
