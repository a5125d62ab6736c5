"""The matrix of weights w_ij of each form, and the sum of the values with them."""

from __future__ import annotations

import tensorflow as tf

from nonlocal_core.spec.calls import check_scores
from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import wide
from nonlocal_tensorflow.methods import products

__all__ = ["key_count", "pairwise_sums", "pairwise_weights", "summands"]


def pairwise_sums(
    theta: tf.Tensor,
    phi: tf.Tensor,
    g: tf.Tensor,
    form: Form,
    key_mask: tf.Tensor | None,
    narrow: tf.DType | None = None,
) -> tf.Tensor:
    """Return y (B, N, D) by way of the N x M matrix; invalid values are 0."""
    valid = None if key_mask is None else tf.expand_dims(key_mask, 1)
    return products.sums(pairwise_weights(theta, phi, form, valid, narrow), g, narrow)


def pairwise_weights(
    theta: tf.Tensor, phi: tf.Tensor, form: Form, valid: tf.Tensor | None, narrow: tf.DType | None = None
) -> tf.Tensor:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    dtype = wide(theta.dtype)
    theta, phi = tf.cast(theta, dtype), tf.cast(phi, dtype)
    if callable(form.pairwise):
        scores = form.scale * tf.cast(check_scores(form.pairwise(theta, phi), theta, phi), dtype)
    elif form.pairwise == "concatenation":
        a, b = summands(theta, phi, form)
        scores = form.scale * tf.nn.relu(tf.expand_dims(a, 2) + tf.expand_dims(b, 1))
    else:
        scores = products.scores(form.scale * theta, phi, narrow)
    if form.softmax:
        return _softmax(scores, valid)
    scores = scores if valid is None else tf.where(valid, scores, tf.constant(0, dtype))
    return scores / key_count(phi, valid)


def summands(theta: tf.Tensor, phi: tf.Tensor, form: Form) -> tuple[tf.Tensor, tf.Tensor]:
    """Return a (B, N) and b (B, M), of which ReLU(a_i + b_j) is the score in the concatenation form."""
    a, b = (tf.tensordot(x, tf.cast(half, x.dtype), 1) for x, half in zip((theta, phi), form.halves, strict=True))
    return a if form.concat_bias is None else a + tf.cast(form.concat_bias, a.dtype), b


def key_count(phi: tf.Tensor, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the number of valid keys, () or that of each row of `valid` (B, N, 1), at least 1 and in float32."""
    if valid is None:
        return tf.cast(tf.shape(phi)[1], wide(phi.dtype))
    return tf.maximum(tf.reduce_sum(tf.cast(valid, wide(phi.dtype)), axis=-1, keepdims=True), 1)


def _softmax(scores: tf.Tensor, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the softmax over the valid keys of each query, 0 for a query without any."""
    if scores.shape[-1] == 1:  # of one key the weight is 1, which the fast division of some processors misses
        ones = tf.where(tf.ones_like(scores, tf.bool), tf.ones_like(scores), scores)  # with gradients of 0
        return ones if valid is None else tf.where(valid, ones, tf.zeros_like(scores))
    if valid is None:
        return tf.nn.softmax(scores)
    # A row without any key would be NaN: it is computed with every key, then set to 0.
    empty = ~tf.reduce_any(valid, axis=-1, keepdims=True)
    scores = tf.where(valid | empty, scores, tf.constant(scores.dtype.min, scores.dtype))
    return tf.where(valid, tf.nn.softmax(scores), tf.constant(0, scores.dtype))
