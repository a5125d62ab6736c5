"""The layers around the operation: from x to theta, phi, g and the valid keys of every set, and from y to z."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from nonlocal_core.geometry import Sets, cut, set_numbers, uncut, windows_of
from nonlocal_core.spec import NonLocalSpec
from nonlocal_jax.layers import Layers, project
from nonlocal_jax.norm import AxisName, Params, normalized

__all__ = ["embed", "embed_rows", "result"]


def embed(
    x: Array, layers: Layers, spec: NonLocalSpec, sets: Sets, key_mask: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Return theta (B', N', C'), phi and g (B', M', C'), and which keys are valid (B', M'), for each set."""
    x = cut(jnp, x, sets)
    mask = None if key_mask is None else _mask_windows(key_mask, sets)
    if sets.window is not None and spec.subsample_at == "input":
        (theta,) = project(x, layers, "theta")
        phi, g = project(_pool(x, sets, mask), layers, "phi", "g")
    else:
        theta, phi, g = project(x, layers, "theta", "phi", "g")
        phi, g = _pool(phi, sets, mask), _pool(g, sets, mask)
    theta = theta.reshape(theta.shape[0], sets.queries, theta.shape[-1])
    return theta, phi, g, None if mask is None else jnp.any(mask, axis=2)[..., 0]


def embed_rows(
    x: Array, layers: Layers, spec: NonLocalSpec, sets: Sets, key_mask: Array | None, chosen: Array | None
) -> tuple[Array, Array, Array]:
    """Return theta of the chosen positions (B, Q, C'), phi of all keys (B, M, C'), and which serve (B or 1, Q, M)."""
    flat = x.reshape(x.shape[0], math.prod(sets.grid), x.shape[-1])
    query_sets, key_sets = set_numbers(jnp, sets, None)
    if chosen is not None:
        flat, query_sets = flat[:, chosen], query_sets[chosen]
    x = cut(jnp, x, sets)
    mask = None if key_mask is None else _mask_windows(key_mask, sets)
    if sets.window is not None and spec.subsample_at == "input":
        (phi,) = project(_pool(x, sets, mask), layers, "phi")
    else:
        (phi,) = project(x, layers, "phi")
        phi = _pool(phi, sets, mask)
    phi, valid = uncut(jnp, phi, sets), (query_sets[:, None] == key_sets[None])[None]
    if mask is not None:
        serves = uncut(jnp, jnp.any(mask, axis=2), sets)
        phi, valid = jnp.where(serves, phi, 0), valid & serves.mT
    (theta,) = project(flat, layers, "theta")
    return theta, phi, valid


def result(
    y: Array,
    x: Array,
    layers: Layers,
    params: Params,
    spec: NonLocalSpec,
    sets: Sets,
    key_mask: Array | None,
    training: bool,
    axis_name: AxisName,
) -> tuple[Array, dict[str, Array]]:
    """Return z, with the shape and the dtype of `x`, from y (B', N', C'), and the statistics found in training."""
    found: dict[str, Array] = {}
    (r,) = project(uncut(jnp, y, sets), layers, "out")
    if "norm" in layers:
        (r,) = project(r, layers, "norm")
    elif spec.norm is not None:
        r, found = normalized(r, params, spec, key_mask, training, axis_name)
    z = r.reshape(x.shape).astype(x.dtype)
    return x + z if spec.residual else z, found


def _mask_windows(key_mask: Array, sets: Sets) -> Array:
    """Return the pooling windows of the mask, (B', M', K, 1)."""
    return windows_of(jnp, cut(jnp, jnp.asarray(key_mask)[..., None], sets), sets)


def _pool(a: Array, sets: Sets, mask: Array | None) -> Array:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M', C)`, 0 where none is.

    `mask` holds the windows of the mask, (B', M', K, 1); without a pooling window it changes nothing.
    """
    if sets.window is None:
        return a.reshape(a.shape[0], sets.keys, a.shape[-1])
    windows = windows_of(jnp, a, sets)
    if mask is not None:
        windows = jnp.where(mask, windows, -jnp.inf)
    # The first of equal values alone is chosen, and alone gets the gradient; `max` would divide it among them.
    chosen = jnp.argmax(windows, axis=2, keepdims=True) == jnp.arange(windows.shape[2])[None, None, :, None]
    largest = jnp.sum(jnp.where(chosen, windows, 0), axis=2)
    return largest if mask is None else jnp.where(jnp.any(mask, axis=2), largest, 0)
