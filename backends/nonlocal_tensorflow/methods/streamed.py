"""The softmax forms by chunks of queries: memory that is linear in their number, in derivatives of every order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import masked, sizes
from nonlocal_tensorflow.methods import products

__all__ = ["streamed"]

Tensors = Sequence[tf.Tensor]
Function = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


def streamed(
    theta: tf.Tensor,
    phi: tf.Tensor,
    g: tf.Tensor,
    form: Form,
    key_mask: tf.Tensor | None,
    rows: int,
    narrow: tf.DType | None = None,
) -> tf.Tensor:
    """Return y (B, N, D) from `rows` queries at a time; invalid keys and values are 0."""
    some = valid = None
    if key_mask is not None:
        # Without any key all of them take part, as zeros, or a row would be NaN.
        some = tf.reduce_any(key_mask, axis=1, keepdims=True)
        valid = tf.expand_dims(key_mask | ~some, 1)

    def attend(queries: Tensors, keys: Tensors) -> tuple[Tensors, Tensors]:
        scores = products.scores(queries[0], keys[0], narrow)
        if valid is not None:
            scores = tf.where(valid, scores, tf.constant(scores.dtype.min, scores.dtype))
        return (products.sums(tf.nn.softmax(scores), keys[1], narrow),), ()

    (y,) = _by_chunks(attend, rows, (form.scale * theta,), (phi, g), (sizes(g)[2],), sums=())
    return y if some is None else masked(y, some)


def _by_chunks(
    function: Function, rows: int, queries: Tensors, keys: Tensors, widths: Sequence[Any], sums: Tensors
) -> Tensors:
    """Apply a function to chunks of queries; its results, of these widths, follow each other, and its sums add up.

    The gradient is a function of the same kind, which computes each chunk anew: so is that of the gradient.
    """
    first, results = len(queries), len(widths)

    @tf.custom_gradient
    def run(*arguments: tf.Tensor) -> tuple[Tensors, Callable[..., Tensors]]:
        queries, keys = arguments[:first], arguments[first:]

        def pulled(chunk: Tensors, keys_and_sums: Tensors) -> tuple[Tensors, Tensors]:
            primal = tuple(chunk[:first]), tuple(keys_and_sums[: len(keys)])
            with tf.GradientTape() as tape:
                tape.watch(primal)
                values = function(*primal)
            cotangents = tuple(chunk[first:]), tuple(keys_and_sums[len(keys) :])
            return tape.gradient(values, primal, cotangents, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        def gradient(*cotangents: tf.Tensor) -> Tensors:
            zeros = tuple(map(tf.zeros_like, keys))
            chunked, totals = (*queries, *cotangents[:results]), (*keys, *cotangents[results:])
            return _by_chunks(pulled, rows, chunked, totals, [sizes(a)[2] for a in queries], zeros)

        # Tapes that are open would record the loop, with what each chunk holds, beside the gradient that it has.
        constant_queries, constant_keys = (tuple(map(tf.stop_gradient, arrays)) for arrays in (queries, keys))
        return _loop(function, rows, constant_queries, constant_keys, widths, sums), gradient

    return run(*queries, *keys)


def _loop(
    function: Function, rows: int, queries: Tensors, keys: Tensors, widths: Sequence[Any], sums: Tensors
) -> Tensors:
    """Return the results and the sums of `_by_chunks`."""
    batch, length, _ = sizes(queries[0])
    count = -(-length // rows)
    count = max(1, count) if isinstance(count, int) else tf.maximum(1, count)
    rows = -(-length // count)  # chunks of equal length need the least padding
    # Without a sample there is nothing to write into.
    steps = count * (min(1, batch) if isinstance(batch, int) else tf.minimum(1, batch))
    padded = [tf.pad(a, [[0, 0], [0, count * rows - length], [0, 0]]) for a in queries]

    def step(number: tf.Tensor, arrays: Any, totals: Any) -> tuple[tf.Tensor, Any, Any]:
        chunk = [tf.slice(a, [0, number * rows, 0], [batch, rows, sizes(a)[2]]) for a in padded]
        values, parts = function(chunk, keys)
        written = tuple(
            tf.tensor_scatter_nd_update(array, tf.reshape(number, [1, 1]), [value])
            for array, value in zip(arrays, values, strict=True)
        )
        return number + 1, written, tuple(total + part for total, part in zip(totals, parts, strict=True))

    # TensorFlow Lite has no arrays of tensors whose sizes are unknown.
    arrays = tuple(tf.zeros([count, batch, rows, width], queries[0].dtype) for width in widths)
    _, arrays, sums = tf.while_loop(
        lambda number, *_: number < steps, step, (0, arrays, tuple(sums)), parallel_iterations=1
    )
    return (*(_joined(array, batch, count * rows)[:, :length] for array in arrays), *sums)


def _joined(array: tf.Tensor, batch: Any, length: Any) -> tf.Tensor:
    """Return chunks of queries as one tensor, (B, N, C)."""
    chunks = tf.transpose(array, [1, 0, 2, 3])
    return tf.reshape(chunks, [batch, length, sizes(chunks)[3]])
