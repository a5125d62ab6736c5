"""Scores, weights and sums of every form, by the matrix of weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.spec.calls import check_scores
from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import narrowed, product, wide_dtype

__all__ = ["pairwise", "pairwise_weights", "summands"]


def pairwise(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None) -> Array:
    """Return y (B, N, D) by the matrix of weights."""
    weights, total = _weights(theta, phi, form, None if valid is None else valid[:, None, :])
    return product("bnm,bmd->bnd", narrowed(weights, theta, g), g, weights.dtype) / total


def pairwise_weights(theta: Array, phi: Array, form: Form, valid: Array) -> Array:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    weights, total = _weights(theta, phi, form, valid)
    return jnp.where(valid, weights / total, 0)


def summands(theta: Array, phi: Array, form: Form, dtype: Any) -> tuple[Array, Array]:
    """Return w_theta . theta_i + b_f (B, N) and w_phi . phi_j (B, M), of whose sum the concatenation takes the ReLU."""
    for_theta, for_phi = (jnp.asarray(half, theta.dtype) for half in form.halves)
    a, b = product("bnc,c->bn", theta, for_theta, dtype), product("bmc,c->bm", phi, for_phi, dtype)
    return a if form.concat_bias is None else a + jnp.asarray(form.concat_bias, dtype), b


def _weights(theta: Array, phi: Array, form: Form, valid: Array | None) -> tuple[Array, Array]:
    """Return weights (B, N, M) and what they are still to be divided by; `valid` is (B or 1, N or 1, M)."""
    dtype = wide_dtype(theta, phi)
    scores = _scores(theta, phi, form, dtype)
    if not form.softmax:
        count = phi.shape[1] if valid is None else jnp.sum(valid, axis=-1, keepdims=True)
        scores = scores if valid is None else jnp.where(valid, scores, 0)
        return scores, jnp.maximum(count, 1).astype(dtype)
    if valid is not None:
        # A row without any key would be NaN: it is computed with every key, all of whose values are 0.
        scores = jnp.where(valid | ~jnp.any(valid, axis=-1, keepdims=True), scores, -jnp.inf)
    weights = _exponentials(scores)
    return weights, lax.stop_gradient(jnp.sum(weights, axis=-1, keepdims=True))


@jax.custom_jvp
def _exponentials(scores: Array) -> Array:
    """Return the exponentials of scores, times what makes the largest of a row 1."""
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)  # which a symbolic number of keys needs
    return jnp.exp(scores - largest)


@_exponentials.defjvp
def _exponentials_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Give the exponentials the derivative that they have when their sum divides them, which then has none."""
    weights, (change,) = _exponentials(*primals), tangents
    total = lax.stop_gradient(jnp.sum(weights, axis=-1, keepdims=True))
    return weights, weights * (change - jnp.sum(weights * change, axis=-1, keepdims=True) / total)


def _scores(theta: Array, phi: Array, form: Form, dtype: Any) -> Array:
    """Return the scaled scores (B, N, M)."""
    if not isinstance(form.pairwise, str):
        theta, phi = theta.astype(dtype), phi.astype(dtype)
        return form.scale * check_scores(form.pairwise(theta, phi), theta, phi)
    if form.pairwise == "concatenation":
        a, b = summands(theta, phi, form, dtype)
        return form.scale * jax.nn.relu(a[:, :, None] + b[:, None, :])
    theta, after = _scaled(theta, form, dtype)
    return after * product("bnc,bmc->bnm", theta, phi, dtype)


def _scaled(theta: Array, form: Form, dtype: Any) -> tuple[Array, float]:
    """Return theta times the scale, and what is left of the scale for the product."""
    # A scaled theta may leave the range of a half-precision operand; its scores are wide and may be scaled instead.
    return (form.scale * theta, 1.0) if theta.dtype == dtype else (theta, form.scale)
