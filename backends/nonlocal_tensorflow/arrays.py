"""What every part of the adapter asks of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["channels_last", "device", "masked", "sizes", "wide"]


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
    return tf.where(mask[..., None], a, tf.constant(0, a.dtype))
