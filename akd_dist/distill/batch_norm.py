"""Batch norm over a global batch: data-parallel workers take mean and variance over all their rows together.

torch's own SyncBatchNorm computes on GPUs alone. This one is plain differentiable torch around one exchange, the sum
over the workers, so it works wherever the workers of a student do, and is exact for shares of any size, empty ones too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from akd_dist.base.errors import RefusedError


class _SumOverWorkers(torch.autograd.Function):
    """A tensor summed over the workers. What any worker's loss makes of the sum flows back to all of them."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        together = mine.clone()
        torch.distributed.all_reduce(together)
        return together

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        together = gradient.contiguous().clone()
        torch.distributed.all_reduce(together)
        return together


class _Synchronised(_BatchNorm):
    """A batch norm whose statistics, while it trains, are those of the rows of all workers."""

    _before: Callable[[], None]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As torch's batch norm on the global batch.

        Args:
            input: this worker's rows, [n, channels] or [n, channels, *positions]; n may be 0.

        Returns:
            The same shape and dtype. The statistics are taken in at least float32.

        Raises:
            ValueError: the workers together have one value for each channel, which has no variance.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        # A worker that has failed answers no exchange: this asks first, so that the others do not wait in vain.
        self._before()
        values = input if input.dtype == torch.float64 else input.float()
        over = [dimension for dimension in range(values.dim()) if dimension != 1]
        shape = [1, -1, *(1 for _ in over[1:])]  # of a statistic, beside the values

        # In float64, which holds the number of values exactly.
        count = torch.tensor([values.numel() // values.shape[1]], dtype=torch.float64, device=values.device)
        sums = _SumOverWorkers.apply(torch.cat([values.sum(over).double(), count]))  # type: ignore[no-untyped-call]
        total = sums[-1].detach()
        if total < 2:
            raise ValueError(f"batch norm needs more than one value for each channel, got inputs {list(input.shape)}")
        mean = sums[:-1] / total
        centred = values - mean.to(values.dtype).view(shape)
        # A second exchange: the mean of squares less the square of the mean would lose digits.
        squares = _SumOverWorkers.apply(centred.square().sum(over).double())  # type: ignore[no-untyped-call]
        variance = squares / total
        self._remember(mean.detach(), squares.detach() / (total - 1))

        normal: torch.Tensor = centred * (variance + self.eps).rsqrt().to(values.dtype).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Move the running statistics towards those of this batch, as torch's batch norm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Synchronised1d(_Synchronised, nn.BatchNorm1d):
    pass


class _Synchronised2d(_Synchronised, nn.BatchNorm2d):
    pass


class _Synchronised3d(_Synchronised, nn.BatchNorm3d):
    pass


_SYNCHRONISED: dict[type[nn.Module], type[_Synchronised]] = {
    nn.BatchNorm1d: _Synchronised1d,
    nn.BatchNorm2d: _Synchronised2d,
    nn.BatchNorm3d: _Synchronised3d,
}


def has_batch_norm(module: nn.Module) -> bool:
    """Whether what a module computes of a row depends on the rows beside it."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def synchronise_batch_norms(module: nn.Module, before: Callable[[], None]) -> None:
    """Let every batch norm of a module take its statistics over the rows of all workers.

    The layers stay the objects that they are and keep their weights and names, so the delivered model is a plain one.

    Args:
        before: called before a layer waits for the other workers; raises where one has failed and will not come.

    Raises:
        RefusedError: as `refuse_own_batch_norms`.
    """
    refuse_own_batch_norms(module)
    for layer in module.modules():
        if type(layer) in _SYNCHRONISED:
            layer.__class__ = _SYNCHRONISED[type(layer)]
            vars(layer)["_before"] = before


def refuse_own_batch_norms(module: nn.Module) -> None:
    """Refuse what cannot be synchronised.

    Raises:
        RefusedError: a batch norm of a further kind, whose own computation cannot be cut into shares.
    """
    for name, layer in module.named_modules():
        if (
            isinstance(layer, _BatchNorm)
            and type(layer) not in _SYNCHRONISED
            and not isinstance(layer, nn.SyncBatchNorm)
        ):
            raise RefusedError(
                f"the layer {name} cannot take batch statistics over several workers",
                got=f"a {type(layer).__module__}.{type(layer).__qualname__}",
                expected="torch's BatchNorm1d, BatchNorm2d or BatchNorm3d",
                next="train it with workers: 1, or without sync_batchnorm",
            )
