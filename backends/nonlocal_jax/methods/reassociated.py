"""The dot product without the matrix of weights: theta (phi^T g) / M."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from nonlocal_core.arguments import known_sizes
from nonlocal_core.planning import keys_first
from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import narrowed, product, wide_dtype
from nonlocal_jax.methods.pairwise import pairwise

__all__ = ["by_products", "reassociated"]


def reassociated(theta: Array, phi: Array, g: Array, form: Form, valid: Array | None) -> Array:
    """Return y (B, N, D) of the dot product, by the cheaper order of the two products."""
    if not keys_first(*known_sizes((theta.shape[1], *phi.shape[1:], g.shape[2]))):
        return pairwise(theta, phi, g, form, valid)
    return by_products(theta, phi, g, form, valid, lambda a: a)


def by_products(
    theta: Array, phi: Array, g: Array, form: Form, valid: Array | None, total: Callable[[Any], Any]
) -> Array:
    """Return theta (phi^T g) / M, where `total` sums up what is taken over keys: others may have more of them."""
    dtype = wide_dtype(theta, phi)
    count = jnp.maximum(total(phi.shape[1] if valid is None else jnp.sum(valid, axis=1)[:, None, None]), 1)
    means = form.scale * total(product("bmc,bmd->bcd", phi, g, dtype)) / count.astype(dtype)
    return product("bnc,bcd->bnd", theta, narrowed(means, theta, g), dtype)
