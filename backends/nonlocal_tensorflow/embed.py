"""What stands around the operation: from x to theta, phi and g of each set of positions, and from y to z."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import tensorflow as tf

from nonlocal_core.geometry import Sets
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_arrays
from nonlocal_tensorflow.arrays import channels_last, checks_when_run, flat, masked, sizes, wide

__all__ = ["Embedded", "embed", "linear", "result", "set_numbers", "uncut"]

Params = Mapping[str, Any]


class Embedded(NamedTuple):
    """The input of a block, cut into B' sets (B without `axes` and groups) and projected."""

    grid: tf.Tensor
    """x `(B, S1..Sk, C)`, in the compute dtype."""
    shape: list[Any]
    """Its sizes; scalar tensors where they are unknown in a trace."""
    sets: Sets
    arrays: list[tf.Tensor]
    """Those that were asked for: theta `(B', N', C')`, phi and g `(B', M', C')`."""
    valid: tf.Tensor | None
    """Which keys take part, `(B', M')`; None: all."""


def embed(
    x: tf.Tensor,
    key_mask: tf.Tensor | None,
    params: Params,
    spec: NonLocalSpec,
    data_format: str,
    dtype: str,
    layers: Sequence[str] = ("theta", "phi", "g"),
    *,
    training: bool,
) -> Embedded:
    """Return the projections of the input of a block in its sets, with the keys pooled.

    Args:
        x: the input of the block in its data format; it is checked.
        key_mask: `(B, S1..Sk)`, or None.
        params: the canonical parameters.
        spec: the block.
        data_format: that of `x`.
        dtype: the compute dtype.
        layers: which of theta, phi and g.
        training: whether batch normalisation takes its statistics from this input.
    """
    grid = x if data_format == "channels_last" else tf.transpose(x, channels_last(range(len(x.shape)), data_format))
    check_arrays(spec, grid.shape, grid, key_mask, training=training)
    grid = tf.cast(grid, dtype)
    shape = sizes(grid)
    sets = spec.sets(shape[1:-1])
    if None in grid.shape or (key_mask is not None and None in key_mask.shape):
        checks = checks_when_run(spec, grid, sets, key_mask, training=training)
        with tf.control_dependencies(checks):  # or statistics would move before a check fails
            grid = tf.identity(grid)
        if grid.shape[-1] is None:
            grid = tf.ensure_shape(grid, [*grid.shape[:-1], spec.channels])
    keys, mask, valid = grid, None, None
    if key_mask is not None:
        keys, mask = masked(grid, key_mask), _cut(key_mask[..., None], sets)
        valid = flat(_reduced(tf.logical_or, mask, sets))[..., 0]
    is_whole = not sets.outer and sets.window is None  # one set without pooling: `linear` gives (B, N, C') at once
    leading = [shape[0], math.prod(shape[1:-1])] if is_whole else shape[:-1]
    if spec.subsample_at == "input":
        keys = _pool(_cut(keys, sets), sets, mask, valid)
    arrays = []
    for layer in layers:
        weight, bias = params.get(f"{layer}.weight"), params.get(f"{layer}.bias")
        if layer == "theta":
            a = linear(grid, weight, bias, leading)
            arrays.append(a if is_whole else flat(_cut(a, sets)))
        elif spec.subsample_at == "input":
            arrays.append(linear(keys, weight, bias, sizes(keys)[:-1]))
        else:
            a = linear(keys, weight, bias, leading)
            arrays.append(a if is_whole else _pool(_cut(a, sets), sets, mask, valid))
    return Embedded(grid, shape, sets, arrays, valid)


def result(
    y: tf.Tensor,
    x: tf.Tensor,
    embedded: Embedded,
    params: Params,
    spec: NonLocalSpec,
    data_format: str,
    norm: Callable[..., tf.Tensor] | None,
) -> tf.Tensor:
    """Return z_i = x_i + norm(W_z y_i + b_z).

    Args:
        y: what the operation gives, `(B', N', C')`.
        x: the input of the block.
        embedded: what `embed` made of it.
        params: the canonical parameters.
        spec: the block.
        data_format: that of `x` and z.
        norm: the layer that normalises by the statistics of this input. None: a norm is a part of the last product.
    """
    batch, *spatial, _ = embedded.shape
    if embedded.sets.outer:
        y = uncut(y, embedded.sets, embedded.sets.inner_sizes)
    weight, bias = params["out.weight"], params.get("out.bias")
    if norm is not None:
        r = norm(linear(y, weight, bias, [batch, math.prod(spatial)]), training=True)
        r = tf.reshape(r, [batch, *spatial, spec.channels])
    else:
        if spec.norm is not None:
            weight, bias = _with_norm(params, spec.norm_epsilon)
        r = linear(y, weight, bias, [batch, *spatial])
    if data_format == "channels_first":
        r = tf.transpose(r, [0, r.shape.rank - 1, *range(1, r.shape.rank - 1)])
    z = tf.cast(r, x.dtype)
    return x + z if spec.residual else z


def linear(a: tf.Tensor, weight: Any, bias: Any, leading: Sequence[Any]) -> tf.Tensor:
    """Return W a + b on the last axis, `a` without a weight, in the dtype of `a`, as `(*leading, C')`."""
    if weight is None:
        return tf.reshape(a, [*leading, a.shape[-1]])
    product = tf.matmul(tf.reshape(a, [-1, weight.shape[1]]), tf.cast(weight, a.dtype), transpose_b=True)
    product = product if bias is None else tf.nn.bias_add(product, tf.cast(bias, a.dtype))
    return tf.reshape(product, [*leading, weight.shape[0]])


def _with_norm(params: Params, epsilon: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Return W_z and b_z with the norm after them in them, by its running statistics if it has any."""
    dtype = wide(params["out.weight"].dtype)
    weight, gamma, beta = (tf.cast(params[name], dtype) for name in ("out.weight", "norm.weight", "norm.bias"))
    if "norm.mean" in params:
        gamma /= tf.sqrt(tf.cast(params["norm.variance"], dtype) + epsilon)
        beta -= gamma * tf.cast(params["norm.mean"], dtype)
    bias = params.get("out.bias")
    return gamma[:, None] * weight, beta if bias is None else beta + gamma * tf.cast(bias, dtype)


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
    a = tf.reshape(a, [-1, *sets.outer_sizes, *inner_sizes, a.shape[-1]])
    return flat(tf.transpose(a, sets.uncut_axes))


def _pool(a: tf.Tensor, sets: Sets, mask: tf.Tensor | None, valid: tf.Tensor | None) -> tf.Tensor:
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
