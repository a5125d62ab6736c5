"""The non-local operation on JAX arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array

from nonlocal_core.planning import Plan, chunk_rows, plan_call
from nonlocal_core.spec.calls import check_op
from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import Spread, device_kind
from nonlocal_jax.methods.fused import fused, serves
from nonlocal_jax.methods.pairwise import pairwise as pairwise_
from nonlocal_jax.methods.reassociated import reassociated
from nonlocal_jax.methods.sorted import sorted_
from nonlocal_jax.methods.streamed import streamed

__all__ = ["aggregate", "nonlocal_op"]


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
        method: "auto", "pairwise" (the N x M matrix), or the method without it that serves the form: "streamed",
            "reassociated" or "sorted".

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
    arrays = [None if a is None else jnp.asarray(a) for a in (theta, phi, g, concat_weight, concat_bias, key_mask)]
    spread = Spread(jnp.asarray(theta))

    def run(
        theta: Array, phi: Array, g: Array, weight: Array | None, bias: Array | None, key_mask: Array | None
    ) -> Array:
        return aggregate(
            theta, phi, g, dataclasses.replace(form, concat_weight=weight, concat_bias=bias), key_mask, method
        )

    return spread.call(run, spread.like(0, 1, None), *arrays)


def aggregate(theta: Array, phi: Array, g: Array, form: Form, key_mask: Array | None, method: str) -> Array:
    """Compute the operation on checked arguments."""
    valid = None
    if key_mask is not None:
        valid = jnp.asarray(key_mask)
        phi, g = (jnp.where(valid[..., None], array, 0) for array in (phi, g))
    device = device_kind()
    # A trace does not tell whether any gradients are asked for.
    call = partial(plan_call, theta, g, form.pairwise, method, backend="jax", device=device, gradients=True)
    plan = call()
    if plan == Plan("streamed") and not serves(theta, phi, g):
        plan = call(has_fused=False)
    if plan == Plan("streamed"):
        y = fused(theta, phi, g, form, valid, chunk_rows(device, theta.shape[0], theta.shape[1], g.shape[1]))
    elif plan.rows is not None:
        y = streamed(theta, phi, g, form, valid, plan.rows)
    else:
        y = _METHODS[plan.method](theta, phi, g, form, valid)
    return y.astype(theta.dtype)


_METHODS = {"pairwise": pairwise_, "reassociated": reassociated, "sorted": sorted_}
