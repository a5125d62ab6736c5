"""The non-local block as pure functions of arrays, for any JAX library."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from nonlocal_core.arguments import check_positions, known_sizes
from nonlocal_core.errors import fail_value
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_block, check_statistics
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_jax.arrays import Spread
from nonlocal_jax.embed import Params, among_all_keys, embed, embed_rows, result
from nonlocal_jax.layers import Layers, affines_of
from nonlocal_jax.methods.pairwise import pairwise_weights
from nonlocal_jax.op import aggregate

__all__ = [
    "arrays_of",
    "attention",
    "block_and_statistics",
    "nonlocal_block",
    "rows_of_weights",
    "running_statistics",
    "updated_statistics",
]


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
    return _compute(x, params, spec, key_mask, training=training, method=method, dtype=dtype)[0]


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
    _, found = _compute(x, params, spec, key_mask, method=method, dtype=dtype, training=True)
    if unbiased:
        count = jnp.asarray(math.prod(x.shape[:-1]), found["norm.variance"].dtype)
        found["norm.variance"] = found["norm.variance"] * (count / (count - 1))
    return running_statistics(params, spec, found)


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
    x, key_mask = arrays_of(spec, x, key_mask)
    spread = Spread(x)

    def run(x: Array, params: Params, key_mask: Array | None) -> Array:
        return rows_of_weights(x, affines_of(params), form_of(spec, params), spec, positions, key_mask, dtype)

    return spread.call(run, spread.like(0, None, None), x, dict(params), key_mask)


def _compute(
    x: Array, params: Params, spec: NonLocalSpec, key_mask: Array | None, *, training: bool, method: str, dtype: Any
) -> tuple[Array, dict[str, Array]]:
    """Return what `block_and_statistics` does, from canonical parameters."""
    check_block(x, params, spec, key_mask, training, method)
    x, key_mask = arrays_of(spec, x, key_mask)
    spread = Spread(x)

    def run(x: Array, params: Params, key_mask: Array | None) -> tuple[Array, dict[str, Array]]:
        layers, form = affines_of(params), form_of(spec, params)
        return block_and_statistics(x, layers, params, form, spec, key_mask, training, method=method, dtype=dtype)

    found = STATISTICS if training and spec.norm == "batch" else ()
    results = spread.like(*range(x.ndim)), dict.fromkeys(found, spread.like())
    return spread.call(run, results, x, dict(params), key_mask)


def arrays_of(spec: NonLocalSpec, x: Array, key_mask: Array | None) -> tuple[Array, Array | None]:
    """Return the arrays that enter as those of JAX; a spec that is static cannot have parameters in it."""
    if isinstance(spec.pairwise, nnx.Module):
        rule = "have a name or a function for `pairwise`; NonLocalBlock takes a module"
        raise fail_value("spec", rule, type(spec.pairwise).__name__)
    return jnp.asarray(x), None if key_mask is None else jnp.asarray(key_mask)


def block_and_statistics(
    x: Array,
    layers: Layers,
    params: Params,
    form: Form,
    spec: NonLocalSpec,
    key_mask: Array | None,
    training: bool,
    *,
    method: str,
    dtype: Any,
) -> tuple[Array, dict[str, Array]]:
    """Return z and, from batch normalisation in training, the mean and the biased variance of each channel.

    The arguments are checked; `params` holds the parameters of the norm, unless it is among the layers.
    """
    wide, sets = x.astype(x.dtype if dtype is None else dtype), spec.sets(x.shape[1:-1])
    theta, phi, g, valid = embed(wide, layers, spec, sets, key_mask)
    y = aggregate(theta, phi, g, form, valid, method)
    return result(y, x, layers, params, spec, sets, training)


def rows_of_weights(
    x: Array, layers: Layers, form: Form, spec: NonLocalSpec, positions: Any, key_mask: Array | None, dtype: Any
) -> Array:
    """Return rows of the weights; all arguments but the positions are checked."""
    sets, chosen = spec.sets(x.shape[1:-1]), None
    if positions is not None:
        chosen = jnp.asarray(check_positions(positions, *known_sizes((math.prod(sets.grid),))))
    wide = x.astype(x.dtype if dtype is None else dtype)
    if form.is_named:
        theta, phi, valid = embed_rows(wide, layers, spec, sets, key_mask, chosen)
        return pairwise_weights(theta, phi, form, valid).astype(x.dtype)
    # A function may know where its arguments stand: it gets what it gets when the block is computed.
    theta, phi, _, serves = embed(wide, layers, spec, sets, key_mask)
    valid = jnp.ones((1, 1, sets.keys), bool) if serves is None else serves[:, None]
    weights = pairwise_weights(theta, jnp.where(valid.mT, phi, 0), form, valid)
    weights = among_all_keys(weights, sets) if sets.count != 1 else weights
    return (weights if chosen is None else weights[:, chosen]).astype(x.dtype)


def running_statistics(params: Params, spec: NonLocalSpec, found: dict[str, Array]) -> dict[str, Array]:
    """Return the running statistics moved towards the ones just found."""
    share, moved = spec.norm_momentum, {}
    for name, new in lax.stop_gradient(found).items():
        old = jnp.asarray(params[name])
        moved[name] = ((1 - share) * old.astype(new.dtype) + share * new).astype(old.dtype)
    return moved
