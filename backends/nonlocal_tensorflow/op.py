"""The non-local operation on TensorFlow tensors."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from nonlocal_core.planning import plan_call
from nonlocal_core.spec.calls import check_op
from nonlocal_core.spec.form import Form
from nonlocal_tensorflow.arrays import device, masked, wide
from nonlocal_tensorflow.methods.pairwise import pairwise_sums
from nonlocal_tensorflow.methods.reassociated import reassociated
from nonlocal_tensorflow.methods.sorted import sorted_sums
from nonlocal_tensorflow.methods.streamed import streamed

__all__ = ["aggregate", "nonlocal_op"]


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
    chosen = plan_call(theta, g, form.pairwise, method, backend="tensorflow", device=device(), gradients=gradients)
    if key_mask is not None:
        phi, g = masked(phi, key_mask), masked(g, key_mask)
    dtype, computed = theta.dtype, wide(theta.dtype)
    # float16 has not the range of weights and sums; a CPU without instructions for bfloat16 is slower with it.
    narrow = dtype if dtype == tf.bfloat16 and device() == "gpu" else None
    kept = narrow if narrow and chosen.method == "reassociated" else computed
    theta, phi, g = tf.cast(theta, kept), tf.cast(phi, kept), tf.cast(g, kept)
    if chosen.rows is not None:
        y = streamed(theta, phi, g, form, key_mask, chosen.rows, narrow)
    elif chosen.method == "reassociated":
        y = reassociated(theta, phi, g, form, key_mask)
    elif chosen.method == "sorted":
        y = sorted_sums(theta, phi, g, form, key_mask)
    else:
        y = pairwise_sums(theta, phi, g, form, key_mask, narrow)
    return tf.cast(y, dtype)
