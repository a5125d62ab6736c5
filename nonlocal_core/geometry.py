"""How the positions of a grid divide into independent sets, and how a set's keys are pooled: sizes, axes and shapes.

The functions take `xp`, the namespace of an array library that follows the array API standard (JAX's is `jax.numpy`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

__all__ = [
    "SPACES",
    "VIDEO",
    "Sets",
    "among_all_keys",
    "cut",
    "interacting_axes",
    "set_numbers",
    "uncut",
    "window_of",
    "windows_of",
]

SPACES = {"all": None, "space": (1, 2), "time": (0,)}
"""The named sets of axes; None is every axis."""

VIDEO = 3
"""The number of spatial axes of a video."""

Array = Any


def interacting_axes(axes: str | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return the spatial axes along which positions interact, of a grid of `rank` axes."""
    named = SPACES[axes] if isinstance(axes, str) else axes
    return tuple(range(rank)) if named is None else named


def window_of(subsample: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...] | None:
    """Return the pooling window with one size for each of `rank` axes, or None without pooling."""
    return (subsample,) * rank if isinstance(subsample, int) else subsample


@dataclasses.dataclass(frozen=True)
class Sets:
    """The sets of one grid, as sizes and axes alone, for any array library.

    A grid `(B, *grid, C)` is transposed to `(B, *outer, *inner, C)` and its batch and outer axes are merged:
    each entry of the merged axis is one set, whose positions interact with each other and with no others.

    Args:
        grid: the spatial sizes; with groups, the frames appear as (number of groups, frames in a group).
        outer: the axes of `grid` that act as batch.
        inner: the axes of `grid` along which positions interact.
        window: the pooling window on each inner axis, or None.
    """

    grid: tuple[int, ...]
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    window: tuple[int, ...] | None

    @property
    def outer_sizes(self) -> tuple[int, ...]:
        """The sizes of the outer axes; their product is the number of sets in one sample."""
        return tuple(self.grid[axis] for axis in self.outer)

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """The sizes of the inner axes: the queries of one set."""
        return tuple(self.grid[axis] for axis in self.inner)

    @property
    def key_sizes(self) -> tuple[int, ...]:
        """The sizes of the inner axes after pooling: the keys of one set."""
        if self.window is None:
            return self.inner_sizes
        return tuple(size // length for size, length in zip(self.inner_sizes, self.window, strict=True))

    @property
    def cut_axes(self) -> tuple[int, ...]:
        """The order in which the axes of `(B, *grid, C)` become `(B, *outer, *inner, C)`."""
        return (0, *(axis + 1 for axis in self.outer + self.inner), len(self.grid) + 1)

    @property
    def uncut_axes(self) -> tuple[int, ...]:
        """The order that undoes `cut_axes`."""
        order = self.cut_axes
        return tuple(order.index(axis) for axis in range(len(order)))

    @property
    def count(self) -> int:
        """The number of sets in one sample."""
        return math.prod(self.outer_sizes)

    @property
    def queries(self) -> int:
        """The number of queries of one set."""
        return math.prod(self.inner_sizes)

    @property
    def keys(self) -> int:
        """The number of keys of one set, before a mask."""
        return math.prod(self.key_sizes)


def cut(xp: Any, a: Array, sets: Sets) -> Array:
    """Take `(B, S1..Sk, C)` apart into sets, `(B', *inner, C)`."""
    a = xp.permute_dims(xp.reshape(a, (a.shape[0], *sets.grid, a.shape[-1])), sets.cut_axes)
    return xp.reshape(a, (a.shape[0] * sets.count, *sets.inner_sizes, a.shape[-1]))


def uncut(xp: Any, a: Array, sets: Sets) -> Array:
    """Put the queries or the keys of all sets, `(B', N', C)`, back in row-major order, `(B, N, C)`."""
    inner = sets.inner_sizes if a.shape[1] == sets.queries else sets.key_sizes
    batch = a.shape[0] // sets.count
    a = xp.permute_dims(xp.reshape(a, (batch, *sets.outer_sizes, *inner, a.shape[-1])), sets.uncut_axes)
    return xp.reshape(a, (batch, sets.count * math.prod(inner), a.shape[-1]))


def windows_of(xp: Any, a: Array, sets: Sets) -> Array:
    """Return the pooling windows of `(B', *inner, C)` as `(B', M, K, C)`; a remainder is dropped."""
    rank, window = len(sets.inner), sets.window or (1,) * len(sets.inner)
    pairs = list(zip(sets.key_sizes, window, strict=True))
    for axis, (size, length) in enumerate(pairs, start=1):
        a = a[(slice(None),) * axis + (slice(size * length), ...)]
    a = xp.reshape(a, (a.shape[0], *itertools.chain(*pairs), a.shape[-1]))
    a = xp.permute_dims(a, (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1))
    return xp.reshape(a, (a.shape[0], sets.keys, math.prod(window), a.shape[-1]))


def set_numbers(xp: Any, sets: Sets, where: Any) -> tuple[Array, Array]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = xp.arange(sets.count, device=where)[:, None, None]
    sizes = (sets.queries, sets.keys)
    queries, keys = (uncut(xp, xp.broadcast_to(numbers, (sets.count, size, 1)), sets)[0, :, 0] for size in sizes)
    return queries, keys


def among_all_keys(xp: Any, weights: Array, sets: Sets, where: Any) -> Array:
    """Return the weights (B', N', M') of each set as (B, N, M), row-major, with 0 for the keys of other sets."""
    query_sets, key_sets = set_numbers(xp, sets, where)
    place = xp.broadcast_to(xp.arange(sets.keys, device=where)[None, :, None], (sets.count, sets.keys, 1))
    rows = xp.take(uncut(xp, weights, sets), uncut(xp, place, sets)[0, :, 0], axis=2)
    return xp.where((query_sets[:, None] == key_sets[None, :])[None, :, :], rows, xp.zeros_like(rows))
