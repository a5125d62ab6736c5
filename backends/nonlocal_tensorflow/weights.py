"""The matrix of weights of each form."""

from __future__ import annotations

import tensorflow as tf

from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import wide

__all__ = ["halves", "pairwise_weights"]


def pairwise_weights(theta: tf.Tensor, phi: tf.Tensor, form: Form, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    dtype = wide(theta.dtype)
    theta, phi = tf.cast(theta, dtype), tf.cast(phi, dtype)
    if not isinstance(form.pairwise, str):
        scores = form.scale * form.pairwise(theta, phi)
    elif form.pairwise == "concatenation":
        a, b = halves(theta, phi, form)
        scores = form.scale * tf.nn.relu(a[:, :, None] + b[:, None, :])
    else:
        scores = tf.matmul(form.scale * theta, phi, transpose_b=True)
    if form.softmax:
        return _softmax(scores, valid)
    if valid is None:
        return scores / tf.cast(tf.shape(phi)[1], dtype)
    count = tf.reduce_sum(tf.cast(valid, dtype), axis=-1, keepdims=True)
    return tf.where(valid, scores, tf.constant(0, dtype)) / tf.maximum(count, 1)


def halves(theta: tf.Tensor, phi: tf.Tensor, form: Form) -> tuple[tf.Tensor, tf.Tensor]:
    """Return a (B, N) and b (B, M), of which ReLU(a_i + b_j) is the score in the concatenation form."""
    weight = tf.cast(form.concat_weight, theta.dtype)
    half = weight.shape[0] // 2
    a, b = tf.tensordot(theta, weight[:half], 1), tf.tensordot(phi, weight[half:], 1)
    return a if form.concat_bias is None else a + tf.cast(form.concat_bias, a.dtype), b


def _softmax(scores: tf.Tensor, valid: tf.Tensor | None) -> tf.Tensor:
    if scores.shape[-1] == 1:  # of one key the weight is 1, which the fast division of some processors misses
        ones = tf.where(tf.ones_like(scores, tf.bool), tf.ones_like(scores), scores)  # with gradients of 0
        return ones if valid is None else tf.where(valid, ones, tf.zeros_like(scores))
    if valid is None:
        return tf.nn.softmax(scores)
    # A row without any key would be NaN: it is computed with every key, then set to 0.
    empty = ~tf.reduce_any(valid, axis=-1, keepdims=True)
    scores = tf.where(valid | empty, scores, tf.constant(float("-inf"), scores.dtype))
    return tf.where(valid, tf.nn.softmax(scores), tf.constant(0, scores.dtype))
