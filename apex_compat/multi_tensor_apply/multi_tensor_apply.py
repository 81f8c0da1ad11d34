"""MultiTensorApply: calls an operation of amp_C."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class MultiTensorApply:
    """Has the interface of apex.multi_tensor_apply.MultiTensorApply.

    Args:
        chunk_size: handed to each operation, which has no use for it here.
    """

    available = True

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def check_avail(self) -> None:
        """Do nothing: the operations are always there."""

    def __call__(
        self, op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *args: Any
    ) -> Any:
        """Return op(chunk_size, noop_flag_buffer, tensor_lists, *args).

        Args:
            op: a function of `amp_C`.
            noop_flag_buffer: integer, shape (1,). Operations that look for inf and nan set it to 1.
            tensor_lists: lists of equal length, as `op` wants them.
            args: further arguments of `op`.
        """
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)
