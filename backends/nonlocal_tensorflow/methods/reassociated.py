"""The dot product without the matrix: the product theta phi^T g is associative."""

from __future__ import annotations

import tensorflow as tf

from nonlocal_core.planning import keys_first
from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.methods.pairwise import key_count

__all__ = ["reassociated"]


def reassociated(theta: tf.Tensor, phi: tf.Tensor, g: tf.Tensor, form: Form, key_mask: tf.Tensor | None) -> tf.Tensor:
    """Return y (B, N, D) by the cheaper order of the two products; invalid keys and values are 0."""
    factor = form.scale / key_count(phi, None if key_mask is None else tf.expand_dims(key_mask, 1))

    def scaled(a: tf.Tensor) -> tf.Tensor:
        return tf.cast(factor * tf.cast(a, factor.dtype), a.dtype)

    if keys_first(theta.shape[1], phi.shape[1], phi.shape[2], g.shape[2]):
        return theta @ scaled(tf.matmul(phi, g, transpose_a=True))
    return scaled(tf.matmul(theta, phi, transpose_b=True)) @ g
