"""Rows of the weights of a block together with what places them on the grid of positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_int, check_positions
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.geometry import set_numbers
from nonlocal_core.spec import NonLocalSpec

__all__ = ["AttentionMap"]

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
    """Which keys some positions attend to.

    `nonlocal_core.plots` draws it.

    Args:
        weights: `(B, Q, M)`, what `block.attention(x, positions)` gives: floats, in an array of any library. A NumPy
            copy without a gradient is kept, in its own dtype (bfloat16 as float32).
        positions: flat indices of the Q queries, row-major. None: all N positions, in their order.
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
        >>> found.key_coordinates()
        array([[0.5, 0.5],
               [0.5, 2.5]])
    """

    weights: Array
    positions: Array
    sizes: tuple[int, ...]
    spec: NonLocalSpec

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.spec, NonLocalSpec):
            raise fail_type("spec", "be a NonLocalSpec", self.spec)
        weights = to_numpy("weights", self.weights)
        try:
            sizes = tuple(self.sizes)
        except TypeError:
            raise fail_type("sizes", "be a sequence of positive ints", self.sizes) from None
        sizes = tuple(check_int("sizes", size) for size in sizes)
        self.spec.check_input((None, *sizes, self.spec.channels))
        count = math.prod(sizes)
        positions = check_positions(np.arange(count) if self.positions is None else self.positions, count)
        for name, value in (("weights", weights), ("positions", positions), ("sizes", sizes)):
            object.__setattr__(self, name, value)
        queries, keys = len(positions), math.prod(self.key_sizes)
        if weights.shape[1:] != (queries, keys):
            raise fail_value("weights", f"have shape (B, {queries}, {keys})", f"shape {weights.shape}")

    def __repr__(self) -> str:
        """Show the weights and the positions by their shapes."""
        shapes = f"weights of shape {self.weights.shape}, positions of shape {self.positions.shape}"
        return f"AttentionMap({shapes}, sizes={self.sizes}, spec={self.spec})"

    @property
    def window(self) -> tuple[int, ...]:
        """How many positions a key covers on each axis."""
        sets = self.spec.sets(self.sizes)
        pooled = {} if sets.window is None else dict(zip(sets.inner, sets.window, strict=True))
        # Groups put an axis before those of the positions.
        return tuple(pooled.get(axis, 1) for axis in range(len(sets.grid) - len(self.sizes), len(sets.grid)))

    @property
    def key_sizes(self) -> tuple[int, ...]:
        """The sizes of the grid of keys; their product is M."""
        sizes = zip(self.sizes, self._spans, self.window, strict=True)
        return tuple(size // span * (span // window) for size, span, window in sizes)

    @property
    def keys_per_query(self) -> int:
        """The number of keys among which one query chooses, before a key mask: those of its set."""
        return self.spec.sets(self.sizes).keys

    def coordinates(self) -> Array:
        """Return the indices of the queries on each axis, `(Q, k)`."""
        return np.stack(np.unravel_index(self.positions, self.sizes), axis=-1)

    def key_coordinates(self) -> Array:
        """Return the middles of the windows of the keys, in the indices of the positions, `(M, k)`."""
        key_at = self._key_at()
        keys, places = key_at[key_at >= 0], np.argwhere(key_at >= 0)
        sums = [np.bincount(keys, weights=places[:, axis]) for axis in range(len(self.sizes))]
        return np.stack(sums, axis=-1) / math.prod(self.window)

    def on_grid(self) -> Array:
        """Return the weights `(B, Q, S1..Sk)`: that of a pooled key on all positions of its window.

        Positions that are no key of the query are NaN: those that no window covers, at the end of an axis, and those
        outside the set of the query.
        """
        numbers, key_at = self._sets()[0], self._key_at()
        of_set = (numbers[self.positions][:, None] == numbers).reshape(-1, *self.sizes)
        weights = self.weights.astype(np.result_type(self.weights, np.float32))
        return np.where(of_set & (key_at >= 0), weights[..., key_at], np.nan)

    def strongest(self, count: int) -> tuple[Array, Array]:
        """Return the keys of each query whose weights are the largest, in magnitude where weights have a sign.

        Args:
            count: how many.

        Returns:
            Flat indices of the keys and their weights, each `(B, Q, count)`, the strongest first.

        Raises:
            TypeError: if `count` is not an int.
            ValueError: if a query has fewer keys.

        Example:
            >>> found = AttentionMap([[[0.2, -0.7, 0.1]]], [0], (3,), NonLocalSpec(channels=2, pairwise="dot_product"))
            >>> found.strongest(2)
            (array([[[1, 0]]]), array([[[-0.7,  0.2]]]))
        """
        if check_int("count", count) > self.keys_per_query:
            raise fail_value("count", f"be at most {self.keys_per_query}, the number of keys of a query", count)
        query_sets, key_sets = self._sets()
        of_set = query_sets[self.positions][:, None] == key_sets
        strength = np.where(of_set, abs(self.weights), -1)
        keys = np.argsort(-strength, axis=-1, kind="stable")[..., :count]
        return keys, np.take_along_axis(self.weights, keys, axis=-1)

    @property
    def _spans(self) -> tuple[int, ...]:
        """The sizes within which windows lie: those of the axes, with groups that of one."""
        return self.spec.sets(self.sizes).grid[-len(self.sizes) :]

    def _sets(self) -> tuple[Array, Array]:
        """Return the numbers of the sets of all positions (N,) and of all keys (M,)."""
        return set_numbers(np, self.spec.sets(self.sizes), None)

    def _key_at(self) -> Array:
        """Return the flat index of the key that covers each position, `(S1..Sk)`; -1 where none does."""
        axes = []
        for size, span, window in zip(self.sizes, self._spans, self.window, strict=True):
            group, within = np.divmod(np.arange(size), span)
            keys = span // window
            axes.append(np.where(within // window < keys, group * keys + within // window, -1))
        found = np.stack(np.meshgrid(*axes, indexing="ij"))
        flat = np.ravel_multi_index(tuple(np.maximum(found, 0)), self.key_sizes)
        return np.where(found.min(axis=0) < 0, -1, flat)
