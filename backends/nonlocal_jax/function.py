"""The non-local block as pure functions of arrays, for any JAX library."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_block, check_statistics
from nonlocal_core.spec.form import form_of
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_jax.arrays import Spread, check_dtype
from nonlocal_jax.forward import arrays_of, block_and_statistics, rows_of_weights
from nonlocal_jax.layers import affines_of
from nonlocal_jax.norm import AxisName, Params, running_statistics
from nonlocal_jax.sharded import mapped_of

__all__ = ["attention", "nonlocal_block", "updated_statistics"]

_psum: Any = lax.psum  # which has no types


def nonlocal_block(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    key_mask: Array | None = None,
    training: bool = False,
    *,
    method: str = "auto",
    dtype: Any = None,
    axis_name: AxisName = None,
    norm_axis_name: AxisName = None,
    sharded_axis: int | None = None,
) -> Array:
    """Compute the non-local block, z_i = x_i + norm(W_z y_i + b_z) (equation 6 of the paper).

    All arguments but `x`, `params` and `key_mask` are static under `jax.jit`. The gradient of the parameters is that
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
        axis_name: the mapped axes, as of `jax.shard_map`, whose batches batch normalisation takes for one; with
            `sharded_axis`, those that cut the positions.
        norm_axis_name: the mapped axes over which batch normalisation takes its statistics. None: `axis_name`.
        sharded_axis: the spatial axis of `x`, from 0, along which `axis_name` cuts the positions: each device has a
            part of them, and the block shares their keys. None: what a device has is a whole, to which it attends
            alone.

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
    mapped = mapped_of(x, spec, axis_name, norm_axis_name, sharded_axis, training=training)
    check_block(x, params, spec, key_mask, sharded_axis is None and training, method)
    check_dtype("dtype", dtype)
    x, key_mask = arrays_of(spec, x, key_mask)
    spread = Spread(x)

    def run(x: Array, params: Params, key_mask: Array | None) -> Array:
        options: dict[str, Any] = {"method": method, "dtype": dtype, "mapped": mapped}
        layers, form = affines_of(params), form_of(spec, params)
        return block_and_statistics(x, layers, params, form, spec, key_mask, training, **options)[0]

    return spread.call(run, spread.like(*range(x.ndim)), x, dict(params), key_mask)


def updated_statistics(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    key_mask: Array | None = None,
    unbiased: bool = False,
    *,
    method: str = "auto",
    dtype: Any = None,
    axis_name: AxisName = None,
    norm_axis_name: AxisName = None,
    sharded_axis: int | None = None,
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
        axis_name: as in `nonlocal_block`, and so are the following.
        norm_axis_name: the mapped axes over which the statistics are taken. None: `axis_name`.
        sharded_axis: the spatial axis of `x` along which `axis_name` cuts the positions, or None.

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
    check_statistics(spec, unbiased)
    mapped = mapped_of(x, spec, axis_name, norm_axis_name, sharded_axis, training=True)
    check_block(x, params, spec, key_mask, sharded_axis is None, method)
    check_dtype("dtype", dtype)
    x, key_mask = arrays_of(spec, x, key_mask)
    spread, devices = Spread(x), 1 if mapped.norm_axes is None else _psum(1, mapped.norm_axes)

    def run(x: Array, params: Params, key_mask: Array | None) -> dict[str, Array]:
        options: dict[str, Any] = {"method": method, "dtype": dtype, "mapped": mapped, "training": True}
        layers, form = affines_of(params), form_of(spec, params)
        _, found = block_and_statistics(x, layers, params, form, spec, key_mask, **options)
        if unbiased:
            variance = found["norm.variance"]
            count = found.get("count", jnp.asarray(devices * math.prod(x.shape[:-1]), variance.dtype))
            found["norm.variance"] = variance * (count / jnp.maximum(count - 1, 1))
        return running_statistics(params, spec, found)

    return spread.call(run, dict.fromkeys(STATISTICS, spread.like()), x, dict(params), key_mask)


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
    check_dtype("dtype", dtype)
    x, key_mask = arrays_of(spec, x, key_mask)
    spread = Spread(x)

    def run(x: Array, params: Params, key_mask: Array | None) -> Array:
        return rows_of_weights(x, affines_of(params), form_of(spec, params), spec, positions, key_mask, dtype)

    return spread.call(run, spread.like(0, None, None), x, dict(params), key_mask)
