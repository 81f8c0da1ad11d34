"""Has the interface of apex.multi_tensor_apply. The operations are in `apex_compat.amp_C`."""

from apex_compat.multi_tensor_apply.multi_tensor_apply import MultiTensorApply

multi_tensor_applier = MultiTensorApply(2048 * 32)

__all__ = ["MultiTensorApply", "multi_tensor_applier"]
