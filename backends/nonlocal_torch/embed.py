"""The way in, from x to theta, phi and g in sets, and the way back, from y to z."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nonlocal_core.geometry import Sets
from nonlocal_torch.context import is_exported
from nonlocal_torch.layers import (
    Affine,
    Layers,
    bare,
    fixed_norm,
    fold_scale,
    memory_format_of,
    project,
    project_back,
)
from nonlocal_torch.norms import normalise
from nonlocal_torch.sharded import Spread

__all__ = ["clean", "cut", "embed", "masks_of", "pool", "result", "uncut"]

_REMAINDER_BINDS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""Whether PyTorch's pooling makes an export serve only sizes with the remainder of the example."""

_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def embed(
    x: Tensor, key_mask: Tensor | None, layers: Layers, sets: Sets, subsample_at: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return theta (B', N, C'), phi and g (B', M, C') and which keys are valid (B', M), for each set."""
    flat = x.flatten(2).transpose(1, 2)
    if layers.theta is None:
        flat = flat.contiguous()  # as theta itself it has no gaps between the channels of a position
    mask, valid = (None, None) if key_mask is None else masks_of(key_mask, sets)
    if sets.window is None or subsample_at == "projection":
        theta, *keys = project(flat, layers)
        phi, g = pool(cut(keys, sets), sets, mask, valid)
    else:
        (theta,) = project(flat, [layers.theta])
        (pooled,) = pool(cut([flat], sets), sets, mask, valid)
        phi, g = project(pooled, [layers.phi, layers.g])
    if sets.outer:
        theta = cut([theta], sets)[0].flatten(1, -2)
    return theta, phi, g, valid


def clean(x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x with 0 in the masked rows that are not finite, and which they are (B, S1..Sk): they are to be NaN."""
    if key_mask is None:
        return x, None
    lost = ~(x.isfinite().all(dim=1) | key_mask)  # in the layout of x: that of the first operand
    return torch.where(lost[:, None], 0.0, x), lost  # which keeps the layout


def result(
    y: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    sets: Sets,
    out: nn.Module,
    norm: nn.Module | None,
    *,
    residual: bool,
    spread: Spread | None = None,
) -> Tensor:
    """Return z = x + norm(W y + b), or without x, in the shape, the dtype and the memory layout of `x`."""
    last, fixed = bare(out), None
    if norm is not None and isinstance(last, Affine):
        fixed = fixed_norm(norm)
        last = last if fixed is None else fold_scale(last, *fixed)
    r = project_back(uncut(y, sets), last, x)
    if norm is not None and fixed is None:
        r = normalise(norm, r, key_mask, spread)
    r = r.to(x.dtype)
    return x + r if residual else r.contiguous(memory_format=memory_format_of(x))


def cut(arrays: Sequence[Tensor], sets: Sets) -> list[Tensor]:
    """Take arrays `(B, N, C)` apart into sets, `(B', *inner, C)`, or leave them where no one asks for the grid."""
    if not sets.outer and sets.window is None:
        return list(arrays)
    axes, outer = sets.cut_axes, len(sets.outer)
    grids = [a.reshape(a.shape[0], *sets.grid, a.shape[-1]) for a in arrays]
    return [a.permute(axes).flatten(0, outer) for a in grids] if outer else grids


def uncut(a: Tensor, sets: Sets) -> Tensor:
    """Put the queries or the keys of all sets, `(B', N', C)`, back in row-major order, `(B, N, C)`."""
    if not sets.outer:
        return a
    inner = sets.inner_sizes if a.shape[1] == sets.queries else sets.key_sizes
    a = a.reshape(-1, *sets.outer_sizes, *inner, a.shape[-1])
    return a.permute(sets.uncut_axes).flatten(1, -2)


def pool(arrays: Sequence[Tensor], sets: Sets, mask: Tensor | None = None, valid: Tensor | None = None) -> list[Tensor]:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is."""
    if sets.window is None:
        return [a.flatten(1, -2) for a in arrays]
    if mask is not None:
        arrays = [a.masked_fill(~mask, -torch.inf) for a in arrays]
    pooled = [_largest(a.movedim(a.dim() - 1, 1), sets.window).flatten(2).transpose(1, 2) for a in arrays]
    return pooled if valid is None else [a.masked_fill(~valid[..., None], 0) for a in pooled]


def _largest(a: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return the largest value of each window of `(B', C, *inner)`, whose gradient goes to the first of its like."""
    if not (_REMAINDER_BINDS and is_exported()):
        return _POOLS[len(window)](a, window)
    for axis, size in enumerate(window, start=2):
        a = a.unfold(axis, size, size)
    return a.flatten(-len(window)).max(dim=-1).values


def masks_of(key_mask: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    """Return the mask as `pool` takes it (B', *inner, 1), and which keys are valid (B', M)."""
    (mask,) = cut([key_mask.flatten(1)[..., None]], sets)
    (shown,) = pool([mask.to(torch.float32)], sets)
    return mask, shown[..., 0] > 0
