"""Batch normalisation with the statistics of the valid positions, of all processes where it is synchronised."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, distributed, nn

from nonlocal_torch.context import widened
from nonlocal_torch.layers import is_bare, norm_dtype
from nonlocal_torch.sharded import Spread, sum_over

__all__ = ["normalise"]


def normalise(norm: nn.Module, r: Tensor, key_mask: Tensor | None, spread: Spread | None = None) -> Tensor:
    """Return what a norm makes of `r` `(B, C, S1..Sk)`; batch statistics are those of the valid positions."""
    flat = r.flatten(2).to(norm_dtype(norm, r.dtype)).contiguous()  # or PyTorch's norm takes twice the time
    synchronised = isinstance(norm, nn.SyncBatchNorm)
    # PyTorch's own synchronised norm works on GPUs alone.
    is_cut = spread is not None and spread.cutting
    is_ours = key_mask is not None or is_cut or (synchronised and flat.device.type == "cpu")
    own = nn.SyncBatchNorm if synchronised else nn.BatchNorm1d
    if not (is_ours and isinstance(norm, own) and type(norm).forward is own.forward and _takes_statistics(norm)):
        return norm(flat).reshape(r.shape)
    valid = torch.ones_like(flat[:, :1], dtype=torch.bool) if key_mask is None else key_mask.flatten(1)[:, None]
    forward = partial(_forward, norm, valid, spread)
    if is_bare(norm, own):
        return forward(flat).reshape(r.shape)
    vars(norm)["forward"] = forward  # called like this its hooks act
    try:
        return norm(flat).reshape(r.shape)
    finally:
        del vars(norm)["forward"]


def _takes_statistics(norm: nn.BatchNorm1d | nn.SyncBatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _forward(norm: nn.BatchNorm1d | nn.SyncBatchNorm, valid: Tensor, spread: Spread | None, a: Tensor) -> Tensor:
    """Return `a` `(B, C, N)` normalised by its mean and variance where `valid` `(B, 1, N)` is True."""
    wide = widened(a)
    count = valid.sum().to(wide.dtype)
    sums = _over_processes(norm, spread, torch.cat([wide.masked_fill(~valid, 0).sum((0, 2)), count[None]]))
    count = sums[-1].detach()
    mean = sums[:-1] / count.clamp(min=1)
    deviations = (wide - mean[:, None]).masked_fill(~valid, 0)
    variance = _over_processes(norm, spread, deviations.square().sum((0, 2))) / count.clamp(min=1)
    means, variances = norm.running_mean, norm.running_var
    if means is not None and variances is not None:
        if norm.training:
            share = _share(norm, count.to(means.dtype))
            means.lerp_(torch.where(count > 0, mean.detach().to(means.dtype), means), share)
            unbiased = _unbiased(variance.detach(), count)
            variances.lerp_(torch.where(count > 0, unbiased.to(variances.dtype), variances), share)
        mean = torch.where(count > 0, mean, means.to(mean.dtype))
        variance = torch.where(count > 0, variance, variances.to(mean.dtype))
    result = (wide - mean[:, None]) * torch.rsqrt(variance + norm.eps)[:, None]
    if norm.weight is not None:
        result = result * norm.weight[:, None] + norm.bias[:, None]
    return result.to(a.dtype)


def _unbiased(variance: Tensor, count: Tensor) -> Tensor:
    return variance * count / (count - 1).clamp(min=1)


def _share(norm: nn.BatchNorm1d | nn.SyncBatchNorm, count: Tensor) -> Tensor | float:
    """Return how far the running statistics move; a batch without a valid position does not count."""
    tracked = norm.num_batches_tracked
    if tracked is not None:
        tracked.add_(count > 0)
    if norm.momentum is None and tracked is not None:
        return 1 / tracked.clamp(min=1).to(count.dtype)
    return 0.0 if norm.momentum is None else norm.momentum


def _over_processes(norm: nn.Module, spread: Spread | None, sums: Tensor) -> Tensor:
    """Return sums over the processes of a synchronised norm or an input, of which a gradient finds its way back."""
    if not (isinstance(norm, nn.SyncBatchNorm) and distributed.is_available() and distributed.is_initialized()):
        return sums if spread is None else spread.total(sums)
    return sum_over(sums, norm.process_group)
