"""How the positions of a grid divide into independent sets, and how a set's keys are pooled."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Sets"]


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
