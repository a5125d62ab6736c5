"""The two products of a matrix of weights, whose operands may be rounded where positions are summed.

A product over channels gives a matrix, from whose numbers a softmax, and its gradient, subtract others: it keeps all
digits. One over positions gives queries, keys or values, which are rounded anyway. The gradients of each are products
of both kinds, and so are derivatives of every order.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

__all__ = ["scores", "sums"]


def scores(a: tf.Tensor, b: tf.Tensor, narrow: tf.DType | None) -> tf.Tensor:
    """Return a b^T, `(B, N, C)` and `(B, M, C)` to `(B, N, M)`; the sums in its gradient round to `narrow`, if any."""
    if narrow is None:
        return tf.matmul(a, b, transpose_b=True)

    @tf.custom_gradient
    def run(a: tf.Tensor, b: tf.Tensor) -> Any:
        def gradient(d: tf.Tensor) -> Any:
            return sums(d, b, narrow), sums(d, a, narrow, transposed=True)

        return tf.matmul(a, b, transpose_b=True), gradient

    return run(a, b)


def sums(weights: tf.Tensor, values: tf.Tensor, narrow: tf.DType | None, *, transposed: bool = False) -> tf.Tensor:
    """Return W v, `(B, N, M)` and `(B, M, D)` to `(B, N, D)`, or W^T v, of operands rounded to `narrow`, if any."""
    if narrow is None:
        return tf.matmul(weights, values, transpose_a=transposed)

    @tf.custom_gradient
    def run(weights: tf.Tensor, values: tf.Tensor) -> Any:
        def gradient(d: tf.Tensor) -> Any:
            pair = (values, d) if transposed else (d, values)
            return scores(*pair, narrow), sums(weights, d, narrow, transposed=not transposed)

        y = tf.matmul(tf.cast(weights, narrow), tf.cast(values, narrow), transpose_a=transposed)
        return tf.cast(y, weights.dtype), gradient

    return run(weights, values)
