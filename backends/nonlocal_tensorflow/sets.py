"""How a grid is cut into sets and pooled, and the checks of sizes that only a run knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import tensorflow as tf

from nonlocal_core.geometry import Sets
from nonlocal_core.spec import NonLocalSpec
from nonlocal_tensorflow.arrays import masked, sizes

__all__ = ["checks_when_run", "cut", "flat", "pool", "pooled_mask", "set_numbers", "uncut"]


def flat(a: tf.Tensor) -> tf.Tensor:
    """Return `(B, S1..Sk, C)` as `(B, N, C)`."""
    shape = sizes(a)
    return tf.reshape(a, [shape[0], math.prod(shape[1:-1]), shape[-1]])


def cut(a: tf.Tensor, sets: Sets) -> tf.Tensor:
    """Take `(B, S1..Sk, C)` apart into sets, `(B', *inner, C)`."""
    if not sets.outer:
        return a
    # The batch is named, or frames that groups do not divide would flow into the next sample.
    a = tf.transpose(tf.reshape(a, [sizes(a)[0], *sets.grid, a.shape[-1]]), sets.cut_axes)
    return tf.reshape(a, [-1, *sets.inner_sizes, a.shape[-1]])


def uncut(a: tf.Tensor, sets: Sets, inner_sizes: Sequence[Any]) -> tf.Tensor:
    """Put the queries or the keys of all sets, `(B', N', C)`, back in row-major order, `(B, N, C)`."""
    if not sets.outer:
        return a
    a = tf.reshape(a, [-1, *sets.outer_sizes, *inner_sizes, a.shape[-1]])
    return flat(tf.transpose(a, sets.uncut_axes))


def pooled_mask(mask: tf.Tensor, sets: Sets) -> tf.Tensor:
    """Return which windows of a mask (B', *inner, 1) hold a valid position, (B', M)."""
    return flat(_reduced(tf.logical_or, mask, sets))[..., 0]


def pool(a: tf.Tensor, sets: Sets, mask: tf.Tensor | None, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is."""
    if sets.window is None:
        return flat(a)
    if mask is None:
        return flat(_reduced(tf.maximum, a, sets))
    a = tf.where(mask, a, tf.constant(float("-inf"), a.dtype))
    return masked(flat(_reduced(tf.maximum, a, sets)), valid)


def _reduced(function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], a: tf.Tensor, sets: Sets) -> tf.Tensor:
    """Reduce each window of `(B', *inner, C)` to one position; a remainder is dropped.

    TensorFlow's own pooling lacks dtypes on the CPU. At a tie the gradient of `tf.maximum` goes to its first
    argument, so with the last axis reduced first it goes to the first position in row-major order.
    """
    windows = enumerate(zip(sets.key_sizes, sets.window or (), strict=sets.window is not None), start=1)
    for axis, (size, length) in reversed(list(windows)):
        if length > 1:
            shape = sizes(a)
            a = a[(slice(None),) * axis + (slice(size * length),)]
            a = tf.reshape(a, [*shape[:axis], size, length, *shape[axis + 1 :]])
            a = reduce(function, tf.unstack(a, num=length, axis=axis + 1))
    return a


def set_numbers(sets: Sets) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = tf.range(sets.count)[:, None, None]
    queries, keys = (
        uncut(tf.tile(numbers, [1, math.prod(inner), 1]), sets, inner)[0, :, 0]
        for inner in (sets.inner_sizes, sets.key_sizes)
    )
    return queries, keys


def checks_when_run(
    spec: NonLocalSpec, grid: tf.Tensor, sets: Sets, key_mask: tf.Tensor | None, *, training: bool
) -> list[Any]:
    """Return checks of the sizes that were unknown when the graph was traced; XLA leaves such checks out."""
    shape, checks = tf.shape(grid), []
    if spec.group_size is not None:
        message = "`group_size` must divide the number of frames."
        checks.append(tf.debugging.assert_equal(shape[1] % spec.group_size, 0, message))
    for size, length in zip(sets.inner_sizes, sets.window or (1,) * len(sets.inner), strict=True):
        message = "`subsample` must leave at least one window on every axis."
        checks.append(tf.debugging.assert_greater_equal(size, length, message))
    if key_mask is not None:
        message = "`key_mask` must have the shape of `x` without its channels."
        checks.append(tf.debugging.assert_equal(tf.shape(key_mask), shape[:-1], message))
    if training and spec.norm == "batch":
        message = "`x` must have more than one value per channel in training with norm 'batch'."
        checks.append(tf.debugging.assert_greater(tf.reduce_prod(shape[:-1]), 1, message))
    return [check for check in checks if check is not None]
