"""The dot product without the matrix of weights: theta (phi^T g) / M."""

from __future__ import annotations

from jax import Array

from nonlocal_core.arguments import known_sizes
from nonlocal_core.planning import keys_first
from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import narrowed, product, wide_dtype
from nonlocal_jax.methods.pairwise import count_of, pairwise

__all__ = ["reassociated"]


def reassociated(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None) -> Array:
    """Return y (B, N, D) of the dot product, by the cheaper order of the two products."""
    if not keys_first(*known_sizes((theta.shape[1], *phi.shape[1:], g.shape[2]))):
        return pairwise(theta, phi, g, form, valid)
    dtype = wide_dtype(theta, phi)
    count = count_of(phi, None if valid is None else valid[:, None, :], dtype)
    means = form.scale * product("bmc,bmd->bcd", phi, g, dtype) / count
    return product("bnc,bcd->bnd", theta, narrowed(means, theta, g), dtype)
