"""Rows of the weights of a block together with what places them on the grid of positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from nonlocal_core.checks import check_positions
from nonlocal_core.errors import check_sizes
from nonlocal_core.spec import NonLocalSpec

__all__ = ["AttentionMap"]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
    """Which keys some positions attend to.

    Args:
        weights: `(B, Q, M)`, what `block.attention(x, positions)` gives.
        positions: flat indices of the Q queries, row-major.
        sizes: S1..Sk, the grid of the queries.
        spec: the block.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the arguments do not fit each other.

    Example:
        >>> spec = NonLocalSpec(channels=4, subsample=2)
        >>> found = AttentionMap(np.array([[[0.75, 0.25]]]), [0], (2, 5), spec)
        >>> found.on_grid()[0, 0]
        array([[0.75, 0.75, 0.25, 0.25,  nan],
               [0.75, 0.75, 0.25, 0.25,  nan]])
    """

    weights: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    sizes: tuple[int, ...]
    spec: NonLocalSpec

    def __post_init__(self) -> None:
        """Check the arguments."""
        weights, sizes = np.asarray(self.weights), tuple(int(size) for size in self.sizes)
        self.spec.check_input((None, *sizes, self.spec.channels))
        positions = check_positions(self.positions, math.prod(sizes))
        for name, value in (("weights", weights), ("positions", positions), ("sizes", sizes)):
            object.__setattr__(self, name, value)
        check_sizes("weights", weights.shape, (None, len(positions), math.prod(self.key_sizes)))

    @property
    def key_sizes(self) -> tuple[int, ...]:
        """The sizes of the grid of keys; with groups, their number comes first."""
        sets = self.spec.sets(self.sizes)
        pooled = dict(zip(sets.inner, sets.key_sizes, strict=True))
        return tuple(pooled.get(axis, size) for axis, size in enumerate(sets.grid))

    def coordinates(self) -> np.ndarray[Any, Any]:
        """Return the indices of the queries on each axis, `(Q, k)`."""
        return np.stack(np.unravel_index(self.positions, self.sizes), axis=-1)

    def on_grid(self) -> np.ndarray[Any, Any]:
        """Return the weights `(B, Q, S1..Sk)`: that of a pooled key on all positions of its window.

        Positions that no window covers, at the end of an axis, are NaN.
        """
        grid = self.spec.sets(self.sizes).grid
        found = self.weights.reshape(*self.weights.shape[:2], *self.key_sizes)
        for axis, (size, keys) in enumerate(zip(grid, self.key_sizes, strict=True), 2):
            found = np.repeat(found, self.window[axis - 2], axis=axis)
            rest = [(0, 0)] * found.ndim
            rest[axis] = (0, size - keys * self.window[axis - 2])
            found = np.pad(found.astype(np.result_type(found, np.float32)), rest, constant_values=np.nan)
        return found.reshape(*self.weights.shape[:2], *self.sizes)

    @property
    def window(self) -> tuple[int, ...]:
        """How many positions a key covers on each axis of `key_sizes`."""
        sets = self.spec.sets(self.sizes)
        pooled = {} if sets.window is None else dict(zip(sets.inner, sets.window, strict=True))
        return tuple(pooled.get(axis, 1) for axis in range(len(sets.grid)))
