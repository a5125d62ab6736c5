"""The non-local operation on JAX arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.checks import check_op
from nonlocal_core.form import Form

__all__ = ["nonlocal_op"]


def nonlocal_op(
    theta: Array,
    phi: Array,
    g: Array,
    pairwise: str | Callable[[Array, Array], Array] = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: Array | None = None,
    concat_bias: Array | None = None,
    normalize: str | None = None,
    key_mask: Array | None = None,
    method: str = "auto",
) -> Array:
    """Compute the non-local operation, y_i = sum_j w_ij g_j (equation 1 of the paper).

    Scores, weights and sums are at least float32, whatever the dtype of the operands, and products of float32
    are full float32 on every device unless `jax.default_matmul_precision` says otherwise.

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
        >>> import jax.numpy as jnp
        >>> theta, phi, g = jnp.ones((1, 2, 4)), jnp.ones((1, 3, 4)), jnp.arange(3.0).reshape(1, 3, 1)
        >>> nonlocal_op(theta, phi, g)[0, :, 0]
        Array([1., 1.], dtype=float32)
    """
    form = check_op(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    return aggregate(*map(jnp.asarray, (theta, phi, g)), form, key_mask)


def aggregate(theta: Array, phi: Array, g: Array, form: Form, key_mask: Array | None) -> Array:
    """Compute the operation on checked arguments."""
    valid = None
    if key_mask is not None:
        valid = jnp.asarray(key_mask)[:, None, :]
        phi, g = (jnp.where(valid.mT, a, 0) for a in (phi, g))
    weights = pairwise_weights(theta, phi, form, valid)
    # A weight fits the range of bfloat16, which is that of float32; otherwise g is widened to meet it.
    narrow = theta.dtype == g.dtype == jnp.bfloat16
    y = product("bnm,bmd->bnd", weights.astype(g.dtype) if narrow else weights, g, weights.dtype)
    return y.astype(theta.dtype)


def pairwise_weights(theta: Array, phi: Array, form: Form, valid: Array | None) -> Array:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    dtype = jnp.result_type(theta, phi, jnp.float32)
    scores = _scores(theta, phi, form, dtype)
    if form.softmax:
        return _softmax(scores, valid)
    if valid is None:
        return scores / jnp.maximum(phi.shape[1], 1).astype(dtype)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    return jnp.where(valid, scores, 0) / jnp.maximum(count, 1).astype(dtype)


def product(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    """Return a product of arrays, summed up and returned in `dtype`."""
    # By default GPUs and TPUs round float32 operands to fewer bits; whoever wants that has a setting for it.
    precision = None if jax.config.jax_default_matmul_precision else lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)


def _scores(theta: Array, phi: Array, form: Form, dtype: Any) -> Array:
    """Return the scaled scores (B, N, M)."""
    if not isinstance(form.pairwise, str):
        return form.scale * form.pairwise(theta.astype(dtype), phi.astype(dtype))
    if form.pairwise == "concatenation":
        weight, half = jnp.asarray(form.concat_weight, theta.dtype), theta.shape[-1]
        a = product("bnc,c->bn", theta, weight[:half], dtype)
        b = product("bmc,c->bm", phi, weight[half:], dtype)
        if form.concat_bias is not None:
            a = a + jnp.asarray(form.concat_bias, dtype)
        return form.scale * jax.nn.relu(a[:, :, None] + b[:, None, :])
    # A scaled theta may leave the range of a half-precision operand; its scores are wide and may be scaled instead.
    before, after = (form.scale, 1.0) if theta.dtype == dtype else (1.0, form.scale)
    return after * product("bnc,bmc->bnm", before * theta, phi, dtype)


def _softmax(scores: Array, valid: Array | None) -> Array:
    if valid is None:
        return jax.nn.softmax(scores)
    # A row without any key would be NaN: it is computed with every key, then set to 0.
    kept = valid | ~jnp.any(valid, axis=-1, keepdims=True)
    return jnp.where(valid, jax.nn.softmax(jnp.where(kept, scores, -jnp.inf)), 0)
