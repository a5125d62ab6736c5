"""The block and its rows of weights on checked arguments, whether its layers are weights or modules."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from nonlocal_core.arguments import check_positions, known_sizes
from nonlocal_core.errors import fail_value
from nonlocal_core.geometry import among_all_keys
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.form import Form
from nonlocal_jax.embed import embed, embed_rows, result
from nonlocal_jax.layers import Layers
from nonlocal_jax.methods.pairwise import pairwise_weights
from nonlocal_jax.norm import Params
from nonlocal_jax.sharded import Mapped

__all__ = ["arrays_of", "block_and_statistics", "rows_of_weights"]


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
    mapped: Mapped,
) -> tuple[Array, dict[str, Array]]:
    """Return z and, from batch normalisation in training, the mean and the biased variance of each channel.

    The arguments are checked; `params` holds the parameters of the norm, unless it is among the layers.
    """
    x, lost = _finite(x, key_mask, dtype)
    wide, sets = x.astype(x.dtype if dtype is None else dtype), spec.sets(x.shape[1:-1])
    theta, phi, g, valid = embed(wide, layers, spec, sets, key_mask)
    y = mapped.aggregate(theta, phi, g, form, valid, method)
    z, found = result(y, x, layers, params, spec, sets, key_mask, training, mapped.norm_axes)
    return (z if lost is None else jnp.where(lost, jnp.nan, z)), found


def _finite(x: Array, key_mask: Array | None, dtype: Any) -> tuple[Array, Array | None]:
    """Return the input with 0 in each masked row that is not finite, and which rows these are, (B, S1..Sk, 1)."""
    if key_mask is None:
        return x, None
    finite = jnp.isfinite(x if dtype is None else x.astype(dtype))
    lost = ~(key_mask[..., None] | jnp.all(finite, axis=-1, keepdims=True))
    return jnp.where(lost, 0, x), lost


def rows_of_weights(
    x: Array, layers: Layers, form: Form, spec: NonLocalSpec, positions: Any, key_mask: Array | None, dtype: Any
) -> Array:
    """Return rows of the weights; all arguments but the positions are checked."""
    sets, chosen = spec.sets(x.shape[1:-1]), None
    if positions is not None:
        chosen = jnp.asarray(check_positions(positions, *known_sizes((math.prod(sets.grid),))))
    x, lost = _finite(x, key_mask, dtype)
    wide = x.astype(x.dtype if dtype is None else dtype)
    if form.is_named:
        theta, phi, valid = embed_rows(wide, layers, spec, sets, key_mask, chosen)
        weights = pairwise_weights(theta, phi, form, valid)
    else:  # a function may know where its arguments stand: it gets what it gets when the block is computed
        theta, phi, _, serves = embed(wide, layers, spec, sets, key_mask)
        valid = jnp.ones((1, 1, sets.keys), bool) if serves is None else serves[:, None]
        weights = pairwise_weights(theta, jnp.where(valid.mT, phi, 0), form, valid)
        weights = among_all_keys(jnp, weights, sets, None) if sets.count != 1 else weights
        weights = weights if chosen is None else weights[:, chosen]
    if lost is not None:
        lost = lost.reshape(lost.shape[0], -1, 1)
        weights = jnp.where(lost if chosen is None else lost[:, chosen], jnp.nan, weights)
    return weights.astype(x.dtype)
