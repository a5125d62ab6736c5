"""What stands around the operation: from x to theta, phi and g of each set of positions, and from y to z."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from nonlocal_core.geometry import Sets
from nonlocal_core.spec.calls import check_arrays
from nonlocal_tensorflow.arrays import channels_last, checks_when_run, flat, masked, sizes, wide
from nonlocal_tensorflow.layers import LayeredBlock
from nonlocal_tensorflow.linear import is_plain, kernel_and_bias, linear, product
from nonlocal_tensorflow.norm import BatchNorm
from nonlocal_tensorflow.sharded import Spread, check_cut, replicas

__all__ = ["Embedded", "among_all_keys", "embed", "result", "set_numbers", "uncut"]

Parts = tuple[tf.Tensor, ...]


class Embedded(NamedTuple):
    """The input of a block, cut into B' sets (B without `axes` and groups) and projected."""

    grid: tf.Tensor
    """x `(B, S1..Sk, C)`, in the compute dtype, with 0 in the rows that are masked and not finite."""
    lost: tf.Tensor | None
    """NaN in these rows and 0 in all others, `(B, S1..Sk, 1)`; None without a mask."""
    shape: list[Any]
    """Its sizes; scalar tensors where they are unknown in a trace."""
    sets: Sets
    arrays: list[tf.Tensor]
    """Those that were asked for: theta `(B', N', C')`, phi and g `(B', M', C')`."""
    key_mask: tf.Tensor | None
    """The mask that was given."""
    valid: tf.Tensor | None
    """Which keys take part, `(B', M')`; None: all."""
    spread: Spread | None
    """Where the keys of a set are, if not all on this replica."""


def embed(
    block: LayeredBlock,
    x: tf.Tensor,
    key_mask: tf.Tensor | None,
    layers: Sequence[str] = ("theta", "phi", "g"),
    *,
    training: bool,
) -> Embedded:
    """Return the projections of the input of a block in its sets, with the keys pooled.

    Args:
        block: its layers, its spec and its formats.
        x: the input of the block in its data format; it is checked.
        key_mask: `(B, S1..Sk)`, or None.
        layers: which of theta, phi and g.
        training: whether batch normalisation takes its statistics from this input.
    """
    spec, order = block.spec, channels_last(range(len(x.shape)), block.data_format)
    grid = x if block.data_format == "channels_last" else tf.transpose(x, order)
    axis = None if block.sharded_axis is None else check_cut(spec, block.sharded_axis, grid.shape, block.norm)
    if replicas() > 1 and getattr(block.norm, "synchronized", False):
        training = False  # the others have values too
    check_arrays(spec, grid.shape, grid, key_mask, training=training)
    grid = tf.cast(grid, block.compute_dtype)
    shape = sizes(grid)
    sets = spec.sets(shape[1:-1])
    if None in grid.shape or (key_mask is not None and None in key_mask.shape):
        checks = checks_when_run(spec, grid, sets, key_mask, axis, training=training)
        with tf.control_dependencies(checks):  # or statistics would move before a check fails
            grid = tf.identity(grid)
        if grid.shape[-1] is None:
            grid = tf.ensure_shape(grid, [*grid.shape[:-1], spec.channels])
    keys, lost, mask, valid = grid, None, None, None
    if key_mask is not None:
        zeros = tf.reduce_sum(0 * tf.stop_gradient(grid), -1, keepdims=True)
        lost = tf.where(tf.expand_dims(key_mask, -1), tf.zeros_like(zeros), zeros)
        grid = tf.where(tf.math.is_nan(lost), tf.zeros_like(grid), grid)
        keys, mask = masked(grid, key_mask), _cut(tf.expand_dims(key_mask, -1), sets)
        valid = tf.squeeze(flat(_reduced(_either, sets, mask)), -1)
    is_whole = not sets.outer and sets.window is None  # one set without pooling: `linear` gives (B, N, C') at once
    leading = [shape[0], math.prod(shape[1:-1])] if is_whole else shape[:-1]
    if spec.subsample_at == "input":
        keys = _pool(_cut(keys, sets), sets, mask, valid)
    arrays = []
    for layer in layers:
        if layer == "theta":
            a = linear(grid, getattr(block, layer), leading)
            arrays.append(a if is_whole else flat(_cut(a, sets)))
        elif spec.subsample_at == "input":
            arrays.append(linear(keys, getattr(block, layer), sizes(keys)[:-1]))
        else:
            a = linear(keys, getattr(block, layer), leading)
            arrays.append(a if is_whole else _pool(_cut(a, sets), sets, mask, valid))
    spread = None if axis is None else Spread(axis, sets.key_sizes)
    return Embedded(grid, lost, shape, sets, arrays, key_mask, valid, spread)


def result(block: LayeredBlock, y: tf.Tensor, x: tf.Tensor, embedded: Embedded, *, training: bool) -> tf.Tensor:
    """Return z_i = x_i + norm(W_z y_i + b_z).

    Args:
        block: its layers, its spec and its formats.
        y: what the operation gives, `(B', N', C')`.
        x: the input of the block.
        embedded: what `embed` made of it.
        training: whether the norm takes the statistics of this input. If not it is a part of the last product.
    """
    spec, lost, (batch, *spatial, _) = block.spec, embedded.lost, embedded.shape
    if embedded.sets.outer:
        y = uncut(y, embedded.sets, embedded.sets.inner_sizes)
    rows = [batch, math.prod(spatial)]
    if spec.norm is None:
        r = linear(y, block.out, [batch, *spatial])
    elif is_plain(block.out) and not training and type(block.norm) in {BatchNorm, type(None)}:
        r = product(y, *_folded(block), [batch, *spatial])
    elif block.norm is None:
        r = tf.cast(linear(y, block.out, [batch, *spatial]), wide(y.dtype))
        r = tf.cast(r * tf.cast(block.norm_weight, r.dtype) + tf.cast(block.norm_bias, r.dtype), y.dtype)
    else:
        mask = None if embedded.key_mask is None else tf.reshape(embedded.key_mask, rows)
        given = {"mask": mask} if isinstance(block.norm, keras.layers.BatchNormalization) else {}
        r = block.norm(linear(y, block.out, rows), training=training, **given)
        r = tf.reshape(r, [batch, *spatial, spec.channels])
    if block.data_format == "channels_first":
        order = [0, r.shape.rank - 1, *range(1, r.shape.rank - 1)]
        r, lost = tf.transpose(r, order), None if lost is None else tf.transpose(lost, order)
    z = tf.cast(r, x.dtype)
    if lost is None:
        return x + z if spec.residual else z
    is_lost = tf.math.is_nan(lost)
    z = tf.where(is_lost, tf.zeros_like(x), x) + z if spec.residual else z
    return tf.where(is_lost, tf.cast(lost, z.dtype), z)


def _folded(block: LayeredBlock) -> tuple[tf.Tensor, tf.Tensor]:
    """Return W_z, as a kernel, and b_z with the norm after them in them, by its running statistics if it has any."""
    kernel, bias = kernel_and_bias(block.out)
    dtype = wide(kernel.dtype)
    params = {name: tf.cast(value, dtype) for name, value in block.own_params().items()}
    gamma, beta = params["norm.weight"], params["norm.bias"]
    if block.norm is not None:
        gamma /= tf.sqrt(params["norm.variance"] + block.spec.norm_epsilon)
        beta -= gamma * params["norm.mean"]
    return gamma * tf.cast(kernel, dtype), beta if bias is None else beta + gamma * tf.cast(bias, dtype)


def _cut(a: tf.Tensor, sets: Sets) -> tf.Tensor:
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
    a = tf.reshape(a, [-1, *sets.outer_sizes, *inner_sizes, sizes(a)[-1]])
    return flat(tf.transpose(a, sets.uncut_axes))


def _pool(a: tf.Tensor, sets: Sets, mask: tf.Tensor | None, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is."""
    if sets.window is None:
        return flat(a)
    if mask is None:
        return flat(_reduced(_larger, sets, a))
    return masked(flat(_reduced(_larger, sets, a, mask)), valid)


def _either(a: Parts, b: Parts) -> Parts:
    """Return whether any of two positions is valid."""
    return (a[0] | b[0],)


def _larger(a: Parts, b: Parts) -> Parts:
    """Return the larger of two values; with whether each is valid beside it, that of the valid ones."""
    if len(a) == 1:
        return (tf.maximum(a[0], b[0]),)
    return tf.maximum(tf.where(a[1], a[0], b[0]), tf.where(b[1], b[0], a[0])), a[1] | b[1]


def _reduced(function: Callable[[Parts, Parts], Parts], sets: Sets, *arrays: tf.Tensor) -> tf.Tensor:
    """Reduce each window of arrays `(B', *inner, C)` to one position and return the first; a remainder is dropped.

    TensorFlow's own pooling lacks dtypes on the CPU. At a tie the gradient of `tf.maximum` goes to its first
    argument, so with the last axis reduced first it goes to the first position in row-major order.
    """
    windows = enumerate(zip(sets.key_sizes, sets.window or (), strict=sets.window is not None), start=1)
    for axis, (size, length) in reversed(list(windows)):
        if length > 1:
            arrays = reduce(function, zip(*(_parts(a, axis, size, length) for a in arrays), strict=True))
    return arrays[0]


def _parts(a: tf.Tensor, axis: int, size: Any, length: int) -> list[tf.Tensor]:
    """Return the first, second, .. position along an axis of each of `size` windows."""
    shape = sizes(a)
    a = a[(slice(None),) * axis + (slice(size * length),)]
    a = tf.reshape(a, [*shape[:axis], size, length, *shape[axis + 1 :]])
    return tf.unstack(a, num=length, axis=axis + 1)


def set_numbers(sets: Sets) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = tf.reshape(tf.range(sets.count), [-1, 1, 1])
    queries, keys = (
        uncut(tf.tile(numbers, [1, math.prod(inner), 1]), sets, inner)[0, :, 0]
        for inner in (sets.inner_sizes, sets.key_sizes)
    )
    return queries, keys


def among_all_keys(weights: tf.Tensor, sets: Sets) -> tf.Tensor:
    """Return the weights (B', N', M') of each set as (B, N, M), row-major, with 0 for the keys of other sets."""
    queries, keys = set_numbers(sets)
    place = tf.tile(tf.reshape(tf.range(sets.keys), [1, -1, 1]), [sets.count, 1, 1])
    place = uncut(place, sets, sets.key_sizes)[0, :, 0]
    rows = tf.gather(uncut(weights, sets, sets.inner_sizes), place, axis=2)
    return tf.where(tf.expand_dims(queries, 1) == keys, rows, tf.zeros_like(rows))
