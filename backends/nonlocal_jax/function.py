"""The non-local block as pure functions of arrays, for any JAX library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.arguments import check_positions, known_sizes
from nonlocal_core.geometry import Sets, cut, set_numbers, uncut, windows_of
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_block, check_statistics
from nonlocal_core.spec.form import form_of
from nonlocal_jax.methods import pairwise_weights, product
from nonlocal_jax.op import aggregate

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
        method: how the operation is computed: "auto", "pairwise" (the N x M matrix), or the method without it that
            serves the form: "streamed", "reassociated" or "sorted".
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
        method: how the operation is computed, see `nonlocal_block`.
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
    mask, keys = _windows(key_mask, sets)
    (phi,) = _operands(cut(jnp, wide, sets), params, spec, sets, mask, keys=("phi",))
    valid, phi = (query_sets[:, None] == key_sets)[None], uncut(jnp, phi, sets)
    if keys is not None:
        keys = uncut(jnp, keys[..., None], sets)
        phi, valid = jnp.where(keys, phi, 0), valid & keys.mT
    (theta,) = _project(flat, params, "theta")
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
    check_block(x, params, spec, key_mask, training)
    check_method(method, spec.pairwise)
    x = jnp.asarray(x)
    r = _branch(x.astype(x.dtype if dtype is None else dtype), params, spec, key_mask, method)
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


def _branch(x: Array, params: Params, spec: NonLocalSpec, key_mask: Array | None, method: str) -> Array:
    """Return W_z y_i + b_z for every position, (B, N, C), in the dtype of `x`."""
    sets = spec.sets(x.shape[1:-1])
    mask, valid = _windows(key_mask, sets)
    theta, phi, g = _operands(cut(jnp, x, sets), params, spec, sets, mask, ("theta",), ("phi", "g"))
    theta = theta.reshape(theta.shape[0], sets.queries, theta.shape[-1])
    y = aggregate(theta, phi, g, form_of(spec, params), valid, method)
    return _project(uncut(jnp, y, sets), params, "out")[0]


def _windows(key_mask: Array | None, sets: Sets) -> tuple[Array | None, Array | None]:
    """Return the pooling windows of the mask, (B', M, K, 1), and which keys are valid, (B', M)."""
    if key_mask is None:
        return None, None
    mask = windows_of(jnp, cut(jnp, jnp.asarray(key_mask)[..., None], sets), sets)
    return mask, jnp.any(mask, axis=2)[..., 0]


def _operands(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    sets: Sets,
    mask: Array | None,
    queries: tuple[str, ...] = (),
    keys: tuple[str, ...] = (),
) -> list[Array]:
    """Return the projections of queries, (B', *inner, C'), and of keys, (B', M, C'), from `x` `(B', *inner, C)`."""
    if sets.window is not None and spec.subsample_at == "input":
        return _project(x, params, *queries) + _project(_pool(x, sets, mask), params, *keys)
    arrays = _project(x, params, *queries, *keys)
    return arrays[: len(queries)] + [_pool(a, sets, mask) for a in arrays[len(queries) :]]


def _project(a: Array, params: Params, *layers: str) -> list[Array]:
    """Return W a + b of each layer in the dtype of `a`, all by one product, and `a` itself for a layer without W."""
    weights = {name: jnp.asarray(params[f"{name}.weight"], a.dtype) for name in layers if f"{name}.weight" in params}
    results = dict.fromkeys(layers, a)
    if weights:
        together = product("...c,dc->...d", a, jnp.concatenate(list(weights.values())), a.dtype)
        results |= zip(weights, jnp.split(together, len(weights), axis=-1), strict=True)
    biases = {name: params.get(f"{name}.bias") for name in layers}
    return [b if biases[name] is None else b + jnp.asarray(biases[name], a.dtype) for name, b in results.items()]


def _moments(a: Array) -> Moments:
    """Return the mean and the biased variance of each channel of `(B, N, C)`."""
    # The rounding errors of one long sum are felt after some steps of training; what it leaves over is small,
    # and its sum exact enough. Any shift gives the same moments, so the shift needs no gradient.
    shift = lax.stop_gradient(jnp.mean(a, axis=(0, 1)))
    rest = jnp.mean(a - shift, axis=(0, 1))
    return shift + rest, jnp.mean(jnp.square(a - shift), axis=(0, 1)) - jnp.square(rest)


def _pool(a: Array, sets: Sets, mask: Array | None) -> Array:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is.

    `mask` holds the windows of the mask, (B', M, K, 1); without a pooling window it changes nothing.
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
