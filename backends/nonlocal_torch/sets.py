"""How positions are cut into sets and keys are pooled, on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_core.geometry import Sets

__all__ = ["cut", "pool", "set_numbers", "uncut"]

_REMAINDER_BINDS = torch.__version__ < (2, 12)
"""Whether PyTorch's pooling makes an export serve only sizes with the remainder of the example."""

_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def cut(a: Tensor, sets: Sets) -> Tensor:
    """Take `(B, N, C)` apart into sets, `(B', *inner, C)`."""
    a = a.reshape(a.shape[0], *sets.grid, a.shape[-1])
    return a.permute(sets.cut_axes).flatten(0, len(sets.outer))


def uncut(a: Tensor, sets: Sets) -> Tensor:
    """Put the queries or the keys of all sets, `(B', N', C)`, back in row-major order, `(B, N, C)`."""
    inner = sets.inner_sizes if a.shape[1] == sets.queries else sets.key_sizes
    a = a.reshape(-1, *sets.outer_sizes, *inner, a.shape[-1])
    return a.permute(sets.uncut_axes).flatten(1, -2)


def pool(a: Tensor, sets: Sets, mask: Tensor | None) -> Tensor:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is."""
    if sets.window is None:
        return a.flatten(1, -2)
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf)
    a = _largest(a.movedim(-1, 1), sets.window).flatten(2).mT
    return a if mask is None else a.masked_fill(a == -torch.inf, 0)


def _largest(a: Tensor, window: Sequence[int]) -> Tensor:
    """Return the largest value of each window of `(B', C, *inner)`, whose gradient goes to the first of its like."""
    if not (_REMAINDER_BINDS and torch.compiler.is_exporting()):
        return _POOLS[len(window)](a, window)
    for axis, size in enumerate(window, start=2):
        a = a.unfold(axis, size, size)
    return a.flatten(-len(window)).max(dim=-1).values


def set_numbers(sets: Sets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = torch.arange(sets.count, device=device)[:, None, None]
    queries, keys = (uncut(numbers.expand(-1, size, 1), sets)[0, :, 0] for size in (sets.queries, sets.keys))
    return queries, keys
