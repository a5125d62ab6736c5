"""The non-local block as pure functions of arrays, for any JAX library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.checks import check_positions, known_sizes
from nonlocal_core.form import form_of
from nonlocal_core.reference import (
    check_block,
    check_statistics,
    cut,
    set_numbers,
    uncut,
    windows_of,
)
from nonlocal_core.sets import Sets
from nonlocal_core.spec import NonLocalSpec
from nonlocal_jax.op import aggregate, pairwise_weights, product

__all__ = ["attention", "nonlocal_block", "updated_statistics"]

Params = Mapping[str, Any]
Moments = tuple[Array, Array]


def nonlocal_block(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    key_mask: Array | None = None,
    training: bool = False,
    *,
    method: str = "auto",
    dtype: Any = None,
) -> Array:
    """Compute the non-local block, z_i = x_i + norm(W_z y_i + b_z) (equation 6 of the paper).

    `spec`, `training`, `method` and `dtype` are static under `jax.jit`. The gradient of the parameters is that
    of `argnums=1`; the running statistics among them get none.

    Args:
        x: `(B, S1..Sk, C)`, k = 1, 2 or 3, floating point.
        params: the canonical parameters, see `nonlocal_core.param_shapes`.
        spec: the block.
        key_mask: `(B, S1..Sk)`, True where a position serves as a key. None: everywhere.
        training: whether batch normalisation uses the statistics of this input; the running ones are not
            changed here, see `updated_statistics`.
        method: how the operation is computed: "auto" or "pairwise" (the N x M matrix).
        dtype: the dtype to which the input and the parameters are cast for the computation. None: that of `x`.

    Returns:
        z, with the shape and the dtype of `x`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape does not fit the spec.

    Example:
        >>> import jax, nonlocal_core as nlc, numpy as np
        >>> spec, x = nlc.NonLocalSpec(channels=4), jax.numpy.ones((1, 5, 6, 4))
        >>> params = nlc.init_params(spec, np.random.default_rng(0))
        >>> bool((jax.jit(nonlocal_block, static_argnums=2)(x, params, spec) == x).all())
        True
    """
    return block_and_moments(x, params, spec, key_mask, training, method=method, dtype=dtype)[0]


def updated_statistics(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    key_mask: Array | None = None,
    unbiased: bool = False,
    *,
    method: str = "auto",
    dtype: Any = None,
) -> dict[str, Array]:
    """Return the running statistics after one training step on `x`.

    Args:
        x: `(B, S1..Sk, C)`.
        params: the canonical parameters, with the running statistics before the step.
        spec: the block; its norm must be "batch".
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.
        unbiased: whether the variance is divided by B N - 1 (as PyTorch does) instead of B N (Keras, Flax).
        method: how the operation is computed.
        dtype: the compute dtype. None: that of `x`.

    Returns:
        "norm.mean" and "norm.variance", each `(C,)`, in their dtypes.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the block has no batch norm, or a shape does not fit.

    Example:
        >>> import jax, nonlocal_core as nlc, numpy as np
        >>> spec = nlc.NonLocalSpec(channels=2, norm="batch", norm_momentum=0.5)
        >>> params = nlc.init_params(spec, np.random.default_rng(0))
        >>> updated_statistics(jax.numpy.ones((1, 9, 2)), params, spec)["norm.variance"]
        Array([0.5, 0.5], dtype=float32)
    """
    check_statistics(spec)
    _, (mean, variance) = block_and_moments(x, params, spec, key_mask, training=True, method=method, dtype=dtype)
    if unbiased:
        count = jnp.asarray(math.prod(x.shape[:-1]), variance.dtype)
        variance = variance * (count / (count - 1))
    return running(params, spec, (mean, variance))


def attention(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    positions: Any = None,
    key_mask: Array | None = None,
    *,
    dtype: Any = None,
) -> Array:
    """Return rows of the weights w_ij with which a block sums its keys.

    Args:
        x: `(B, S1..Sk, C)`.
        params: the canonical parameters.
        spec: the block.
        positions: flat indices of Q queries, row-major, known when the function is traced. None: all N.
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.
        dtype: the compute dtype. None: that of `x`.

    Returns:
        `(B, Q, M)` in the dtype of `x`: M counts every key of the pooled grid in row-major order, and the
        weight is 0 where a key is masked or lies outside the set of the query.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape does not fit the spec or a position is out of range.

    Example:
        >>> import jax, nonlocal_core as nlc, numpy as np
        >>> spec = nlc.NonLocalSpec(channels=4, subsample=2)
        >>> params = nlc.init_params(spec, np.random.default_rng(0))
        >>> attention(jax.numpy.ones((1, 6, 8, 4)), params, spec, [0, 7]).shape
        (1, 2, 12)
    """
    check_block(x, params, spec, key_mask, training=False)
    x = jnp.asarray(x)
    wide, sets = x.astype(x.dtype if dtype is None else dtype), spec.sets(x.shape[1:-1])
    flat = wide.reshape(x.shape[0], math.prod(sets.grid), x.shape[-1])
    query_sets, key_sets = set_numbers(jnp, sets, None)
    if positions is not None:
        chosen = jnp.asarray(check_positions(positions, *known_sizes(flat.shape[1:2])))
        flat, query_sets = flat[:, chosen], query_sets[chosen]
    phi, _, mask = _keys(wide, params, spec, sets, key_mask)
    valid, phi = (query_sets[:, None] == key_sets)[None], uncut(jnp, phi, sets)
    if mask is not None:
        mask = uncut(jnp, mask[..., None], sets)
        phi, valid = jnp.where(mask, phi, 0), valid & mask.mT
    theta = _embed(flat, params, spec, "theta")
    return pairwise_weights(theta, phi, form_of(spec, params), valid).astype(x.dtype)


def block_and_moments(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    key_mask: Array | None,
    training: bool,
    *,
    method: str,
    dtype: Any,
) -> tuple[Array, Moments | None]:
    """Return z and, from batch normalisation in training, the mean and the biased variance of each channel."""
    check_block(x, params, spec, key_mask, training, method)
    x = jnp.asarray(x)
    r = _branch(x.astype(x.dtype if dtype is None else dtype), params, spec, key_mask)
    found = None
    if spec.norm is not None:
        r = r.astype(jnp.promote_types(r.dtype, jnp.float32))
        norm = {name: jnp.asarray(a, r.dtype) for name, a in params.items() if name.startswith("norm.")}
        if spec.norm == "batch":
            mean, variance = (lax.stop_gradient(norm[f"norm.{name}"]) for name in ("mean", "variance"))
            if training:
                found = mean, variance = _moments(r)
            r = (r - mean) * lax.rsqrt(variance + spec.norm_epsilon)
        r = r * norm["norm.weight"] + norm["norm.bias"]
    z = r.reshape(x.shape).astype(x.dtype)
    return x + z if spec.residual else z, found


def running(params: Params, spec: NonLocalSpec, found: Moments) -> dict[str, Array]:
    """Return the running statistics moved towards the ones just found."""
    share, result = spec.norm_momentum, {}
    for name, new in zip(("norm.mean", "norm.variance"), lax.stop_gradient(found), strict=True):
        old = jnp.asarray(params[name])
        result[name] = ((1 - share) * old.astype(new.dtype) + share * new).astype(old.dtype)
    return result


def _branch(x: Array, params: Params, spec: NonLocalSpec, key_mask: Array | None) -> Array:
    """Return W_z y_i + b_z for every position, (B, N, C), in the dtype of `x`."""
    sets = spec.sets(x.shape[1:-1])
    theta = cut(jnp, _embed(x, params, spec, "theta"), sets)
    theta = theta.reshape(theta.shape[0], sets.queries, theta.shape[-1])
    phi, g, valid = _keys(x, params, spec, sets, key_mask)
    y = aggregate(theta, phi, g, form_of(spec, params), valid)
    return _project(uncut(jnp, y, sets), params, "out")


def _keys(
    x: Array, params: Params, spec: NonLocalSpec, sets: Sets, key_mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Return phi and g (B', M, C') and which keys are valid (B', M), for each set."""
    mask = valid = None
    if key_mask is not None:
        mask = jnp.asarray(key_mask)[..., None]
        x, mask = jnp.where(mask, x, 0), windows_of(jnp, cut(jnp, mask, sets), sets)
        valid = jnp.any(mask, axis=2)[..., 0]
    x = cut(jnp, x, sets)
    if spec.subsample_at == "input":
        x = _pool(x, sets, mask)
        return _embed(x, params, spec, "phi"), _project(x, params, "g"), valid
    phi, g = _embed(x, params, spec, "phi"), _project(x, params, "g")
    return _pool(phi, sets, mask), _pool(g, sets, mask), valid


def _embed(a: Array, params: Params, spec: NonLocalSpec, layer: str) -> Array:
    """Return the projection to theta or phi, or `a` itself for the form without an embedding."""
    return _project(a, params, layer) if spec.has_embedding else a


def _project(a: Array, params: Params, layer: str) -> Array:
    """Return W a + b on the last axis, in the dtype of `a`."""
    bias = params.get(f"{layer}.bias")
    result = product("...c,dc->...d", a, jnp.asarray(params[f"{layer}.weight"], a.dtype), a.dtype)
    return result if bias is None else result + jnp.asarray(bias, a.dtype)


def _moments(a: Array) -> Moments:
    """Return the mean and the biased variance of each channel of `(B, N, C)`."""
    # The rounding errors of one long sum are felt after some steps of training; what it leaves over is small,
    # and its sum exact enough. Any shift gives the same moments, so the shift needs no gradient.
    shift = lax.stop_gradient(jnp.mean(a, axis=(0, 1)))
    rest = jnp.mean(a - shift, axis=(0, 1))
    return shift + rest, jnp.mean(jnp.square(a - shift), axis=(0, 1)) - jnp.square(rest)


def _pool(a: Array, sets: Sets, mask: Array | None) -> Array:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is.

    `mask` holds the windows of the mask, (B', M, K, 1).
    """
    windows = windows_of(jnp, a, sets)
    if sets.window is None:
        return windows[:, :, 0]
    if mask is not None:
        windows = jnp.where(mask, windows, -jnp.inf)
    # The first of equal values alone is chosen, and alone gets the gradient; `max` would divide it among them.
    chosen = jnp.argmax(windows, axis=2, keepdims=True) == jnp.arange(windows.shape[2])[:, None]
    largest = jnp.sum(jnp.where(chosen, windows, 0), axis=2)
    return largest if mask is None else jnp.where(jnp.any(mask, axis=2), largest, 0)
