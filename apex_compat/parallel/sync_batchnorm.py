"""Normalizes by the statistics of the batches of all processes."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch normalization whose training statistics are those of all processes of a group.

    The batches of the processes may have different sizes, also 0. With one process, or without a process group, it
    is torch's batch norm in every bit. In evaluation no process waits for another one. Statistics and sums are
    float32 for half-precision inputs, whatever the dtype of the parameters.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics. None makes them the mean of all batches.
        affine: True for a learnable weight and bias, shape (C,).
        track_running_stats: False normalizes by the batch in evaluation too.
        process_group: the processes that belong together; all by default.
        channel_last: True for inputs of shape (N, *, C), whatever their memory format; False for (N, C, *).
        fuse_relu: True applies a ReLU to the output.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        channel_last: bool = False,
        fuse_relu: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group
        self.channel_last = channel_last
        self.fuse_relu = fuse_relu

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        """Return relu(norm(input) + z), the ReLU only with `fuse_relu`, in the dtype and shape of `input`.

        Args:
            input: shape (N, C, *), or (N, *, C) with `channel_last`.
            z: shape of `input`; nothing is added by default.

        Raises:
            ValueError: `input` has fewer than two dimensions or another number of channels.
            RuntimeError: in backward, with `create_graph=True` and several processes.
        """
        x = input.movedim(-1, 1) if self.channel_last and input.dim() > 1 else input
        self._check_input_dim(x)
        x = self._synchronized(x) if self._has_others() else super().forward(x)
        x = x.movedim(1, -1) if self.channel_last else x
        x = x if z is None else x + z
        return F.relu(x) if self.fuse_relu else x

    def _check_input_dim(self, input: Tensor) -> None:
        channels = input.shape[1] if input.dim() > 1 else None
        if channels != self.num_features:
            place = "(N, *, C)" if self.channel_last else "(N, C, *)"
            raise ValueError(
                f"an input has {channels or 'no'} channels; it must have {self.num_features}, in the shape {place}"
            )

    def _has_others(self) -> bool:
        initialized = self.training and dist.is_available() and dist.is_initialized()
        return initialized and dist.get_world_size(self.process_group) > 1

    def _synchronized(self, x: Tensor) -> Tensor:
        mean, var, count = _statistics(x.detach(), self.process_group)
        self._track(mean, var * (count / (count - 1).clamp(min=1)))
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (self.weight, self.bias))
        result: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, mean, var, count, self.eps, self.process_group
        )
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


def _statistics(x: Tensor, group: "dist.ProcessGroup | None") -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance, shape (C,), and number of values of each channel, over all ranks.

    Each rank sends its mean, variance and count. They are joined by the formula of Chan, Golub and LeVeque (1979),
    which loses nothing where the mean is large.
    """
    channels = x.shape[1]
    dims = [0, *range(2, x.dim())]
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.new_full((1,), x.numel() // channels, dtype=dtype)
    if x.numel():
        var, mean = torch.var_mean(x.to(dtype), dims, correction=0)
    else:
        var, mean = count.new_zeros(2, channels)
    own = torch.cat([mean, var, count])
    everybody = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(everybody.unbind()), own, group=group)
    means, variances, counts = torch.split(everybody, [channels, channels, 1], dim=1)
    total = counts.sum()
    shares = counts / total
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), total


class _Normalize(Function):
    """Normalizes by given statistics; its gradient knows that they depend on the inputs of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: "dist.ProcessGroup | None",
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        ctx.group = group
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # mean and inv_std are constants here: the second derivative would be wrong
            raise RuntimeError("SyncBatchNorm over several processes has no second derivative; leave out create_graph")
        x, weight, mean, inv_std, count = ctx.saved_tensors
        dims, shape = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * inv_std.view(shape)
        own = torch.stack([wide.sum(dims), (wide * normal).sum(dims)])
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        of_grad, of_product = (sums / count).view(2, *shape)
        scale = inv_std if weight is None else inv_std * weight
        grad_x = (wide - of_grad - normal * of_product) * scale.view(shape)
        # Gradients of weight and bias are this rank's own; DistributedDataParallel averages them.
        grad_weight, grad_bias = (None, None) if weight is None else (own[1], own[0])
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None
