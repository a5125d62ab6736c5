"""The non-local operation on TensorFlow tensors."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from nonlocal_core.planning import Plan, keys_first, plan
from nonlocal_core.spec.calls import check_op
from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import device, masked, wide
from nonlocal_tensorflow.sorted import sorted_sums
from nonlocal_tensorflow.streamed import streamed
from nonlocal_tensorflow.weights import pairwise_weights

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
        method: "auto", "pairwise" (the N x M matrix), or the method without it that serves the form: "streamed"
            (gaussian, embedded_gaussian), "reassociated" (dot_product) or "sorted" (concatenation).

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
    return aggregate(theta, phi, g, form, key_mask, method, gradients=True)


def aggregate(
    theta: tf.Tensor,
    phi: tf.Tensor,
    g: tf.Tensor,
    form: Form,
    key_mask: tf.Tensor | None,
    method: str,
    *,
    gradients: bool,
) -> tf.Tensor:
    """Compute the operation on checked arguments; `gradients` says whether some may be asked for."""
    chosen = _plan(theta, phi, g, form, method, gradients=gradients)
    if key_mask is not None:
        phi, g = (masked(a, key_mask) for a in (phi, g))
    dtype = theta.dtype
    theta, phi, g = (tf.cast(a, wide(dtype)) for a in (theta, phi, g))
    valid = None if key_mask is None else key_mask[:, None, :]
    if chosen.method == "streamed":
        y = streamed(theta, phi, g, form, key_mask, chosen.rows)
    elif chosen.method == "reassociated":
        y = _reassociated(theta, phi, g, form.scale / _count(phi, valid))
    elif chosen.method == "sorted":
        y = form.scale * sorted_sums(theta, phi, g, form, key_mask) / _count(phi, valid)
    else:
        y = pairwise_weights(theta, phi, form, valid) @ g
    return tf.cast(y, dtype)


def _plan(theta: tf.Tensor, phi: tf.Tensor, g: tf.Tensor, form: Form, method: str, *, gradients: bool) -> Plan:
    batch, queries, inner = theta.shape
    width = g.shape[-1]
    return plan(
        method,
        form.pairwise,
        backend="tensorflow",
        device=device(),
        dtype=theta.dtype.name,
        batch=batch,
        queries=queries,
        keys=phi.shape[1],
        inner=None if inner is None or width is None else max(inner, width),
        gradients=gradients,
    )


def _reassociated(theta: tf.Tensor, phi: tf.Tensor, g: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Return the sum over j of (theta_i . phi_j) g_j times a factor, by the cheaper order of the two products."""
    if keys_first(theta.shape[1], phi.shape[1], phi.shape[2], g.shape[2]):
        return theta @ (factor * tf.matmul(phi, g, transpose_a=True))
    return (factor * tf.matmul(theta, phi, transpose_b=True)) @ g


def _count(phi: tf.Tensor, valid: tf.Tensor | None) -> tf.Tensor:
    """Return the number of valid keys, () or (B, 1, 1), at least 1."""
    if valid is None:
        return tf.cast(tf.shape(phi)[1], phi.dtype)
    return tf.maximum(tf.reduce_sum(tf.cast(valid, phi.dtype), axis=-1, keepdims=True), 1)
