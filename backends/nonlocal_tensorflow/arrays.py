"""What every part of the adapter asks of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import tensorflow as tf

from nonlocal_core.geometry import Sets
from nonlocal_core.spec import NonLocalSpec

__all__ = ["channels_last", "checks_when_run", "device", "flat", "masked", "sizes", "wide"]


@cache
def device() -> str:
    """Return the kind of device that TensorFlow computes on by default: a tensor in a trace has none yet."""
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def sizes(a: tf.Tensor) -> list[Any]:
    """Return the shape of `a`: ints, and scalar tensors for sizes that are unknown while it is traced."""
    return [tf.shape(a)[axis] if size is None else size for axis, size in enumerate(a.shape)]


def channels_last(shape: Sequence[Any], data_format: str) -> tuple[Any, ...]:
    """Return a shape in a data format in the order of channels last."""
    shape = tuple(shape)
    return shape if data_format == "channels_last" else (*shape[:1], *shape[2:], *shape[1:2])


def wide(dtype: tf.DType) -> tf.DType:
    """Return float64 for itself, and float32 for all others."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def masked(a: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Return `a` (..., C) where the mask (...) is true, 0 elsewhere."""
    return tf.where(tf.expand_dims(mask, -1), a, tf.constant(0, a.dtype))


def flat(a: tf.Tensor) -> tf.Tensor:
    """Return `(B, S1..Sk, C)` as `(B, N, C)`."""
    shape = sizes(a)
    return tf.reshape(a, [shape[0], math.prod(shape[1:-1]), shape[-1]])


def checks_when_run(
    spec: NonLocalSpec, grid: tf.Tensor, sets: Sets, key_mask: tf.Tensor | None, cut: int | None, *, training: bool
) -> list[Any]:
    """Return checks of the sizes that were unknown when the graph was traced; XLA leaves such checks out.

    Replicas cut the sets along the axis `cut`, if any.
    """
    shape, checks = tf.shape(grid), []
    if spec.group_size is not None:
        message = "`group_size` must divide the number of frames."
        checks.append(tf.debugging.assert_equal(shape[1] % spec.group_size, 0, message))
    window = sets.window or (1,) * len(sets.inner)
    for axis, (size, length) in enumerate(zip(sets.inner_sizes, window, strict=True)):
        message = "`subsample` must leave at least one window on every axis."
        checks.append(tf.debugging.assert_greater_equal(size, length, message))
        if axis == cut:
            checks.append(
                tf.debugging.assert_equal(size % length, 0, "`x` must be cut between windows of `subsample`.")
            )
    if key_mask is not None:
        message = "`key_mask` must have the shape of `x` without its channels."
        checks.append(tf.debugging.assert_equal(tf.shape(key_mask), shape[:-1], message))
    if training and spec.norm == "batch":
        message = "`x` must have more than one value per channel in training with norm 'batch'."
        checks.append(tf.debugging.assert_greater(tf.reduce_prod(shape[:-1]), 1, message))
    return [check for check in checks if check is not None]
