"""The non-local operation on TensorFlow tensors."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from nonlocal_core.checks import check_op
from nonlocal_core.form import Form

__all__ = ["nonlocal_op"]


def nonlocal_op(
    theta: tf.Tensor,
    phi: tf.Tensor,
    g: tf.Tensor,
    pairwise: str | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: tf.Tensor | None = None,
    concat_bias: tf.Tensor | None = None,
    normalize: str | None = None,
    key_mask: tf.Tensor | None = None,
    method: str = "auto",
) -> tf.Tensor:
    """Compute the non-local operation, y_i = sum_j w_ij g_j (equation 1 of the paper).

    Scores, weights and sums are at least float32, whatever the dtype of the operands. Sizes may be unknown when
    the operation is traced.

    Args:
        theta: queries `(B, N, C')`.
        phi: keys `(B, M, C')`.
        g: values `(B, M, D)`.
        pairwise: "gaussian", "embedded_gaussian", "dot_product", "concatenation", or a function
            `f(theta, phi) -> scores (B, N, M)` of each pair alone.
        scale: a finite, non-zero float that multiplies the scores; None is 1.
        concat_weight: w_f `(2C',)`, the half for theta first; for the concatenation form.
        concat_bias: b_f `()`; for the concatenation form, optional.
        normalize: "softmax" or "count" for a function, None for the named forms.
        key_mask: `(B, M)`, True where a key takes part. A query without any key gives 0.
        method: "auto" or "pairwise".

    Returns:
        y `(B, N, D)` in the dtype of `theta`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if shapes or options do not fit each other.

    Example:
        >>> theta, phi, g = tf.ones((1, 2, 4)), tf.ones((1, 3, 4)), tf.reshape(tf.range(3.0), (1, 3, 1))
        >>> nonlocal_op(theta, phi, g)[0, :, 0].numpy()
        array([1., 1.], dtype=float32)
    """
    form = check_op(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    return aggregate(theta, phi, g, form, key_mask)


def aggregate(theta: tf.Tensor, phi: tf.Tensor, g: tf.Tensor, form: Form, key_mask: tf.Tensor | None) -> tf.Tensor:
    """Compute the operation on checked arguments; every method is the matrix form."""
    if key_mask is not None:
        phi, g = (masked(a, key_mask) for a in (phi, g))
    valid = None if key_mask is None else key_mask[:, None, :]
    weights = pairwise_weights(theta, phi, form, valid)
    return tf.cast(weights @ tf.cast(g, weights.dtype), theta.dtype)


def wide(dtype: tf.DType) -> tf.DType:
    """Return float64 for itself, and float32 for all others."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def masked(a: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Return `a` (..., C) where the mask (...) is true, 0 elsewhere."""
    return tf.where(mask[..., None], a, tf.constant(0, a.dtype))


def pairwise_weights(theta: tf.Tensor, phi: tf.Tensor, form: Form, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    dtype = wide(theta.dtype)
    theta, phi = tf.cast(theta, dtype), tf.cast(phi, dtype)
    if not isinstance(form.pairwise, str):
        scores = form.scale * form.pairwise(theta, phi)
    elif form.pairwise == "concatenation":
        weight = tf.cast(form.concat_weight, dtype)
        half = weight.shape[0] // 2
        a, b = tf.tensordot(theta, weight[:half], 1), tf.tensordot(phi, weight[half:], 1)
        a = a if form.concat_bias is None else a + tf.cast(form.concat_bias, dtype)
        scores = form.scale * tf.nn.relu(a[:, :, None] + b[:, None, :])
    else:
        scores = tf.matmul(form.scale * theta, phi, transpose_b=True)
    if form.softmax:
        return _softmax(scores, valid)
    if valid is None:
        return scores / tf.cast(tf.shape(phi)[1], dtype)
    count = tf.reduce_sum(tf.cast(valid, dtype), axis=-1, keepdims=True)
    return tf.where(valid, scores, tf.constant(0, dtype)) / tf.maximum(count, 1)


def _softmax(scores: tf.Tensor, valid: tf.Tensor | None) -> tf.Tensor:
    if valid is None:
        return tf.nn.softmax(scores)
    # A row without any key would be NaN: it is computed with every key, then set to 0.
    empty = ~tf.reduce_any(valid, axis=-1, keepdims=True)
    scores = tf.where(valid | empty, scores, tf.constant(float("-inf"), scores.dtype))
    return tf.where(valid, tf.nn.softmax(scores), tf.constant(0, scores.dtype))
