"""The block as code: equation 6 of Wang et al. (CVPR 2018) around the operation, in float64, on any array library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from array_api_compat import array_namespace, device

from nonlocal_core.arguments import check_positions
from nonlocal_core.geometry import Sets, cut, set_numbers, uncut, windows_of
from nonlocal_core.reference.operation import aggregate, check_numpy, narrowed, weights_of, widened
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_block, check_statistics
from nonlocal_core.spec.form import form_of

__all__ = ["attention", "nonlocal_block", "updated_statistics"]

Array = Any
Params = Mapping[str, Array]


def nonlocal_block(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    key_mask: Array = None,
    training: bool = False,
    *,
    method: str = "auto",
) -> Array:
    """Compute the non-local block, z_i = x_i + norm(W_z y_i + b_z) (equation 6).

    Args:
        x: `(B, S1..Sk, C)`, k = 1, 2 or 3, floating point.
        params: the canonical parameters, arrays of the same library as `x`.
        spec: the block.
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.
        training: whether batch normalisation uses the statistics of this input; the running ones are not
            changed here, see `updated_statistics`.
        method: how the operation is computed, see `nonlocal_op`.

    Returns:
        z, with the shape and the dtype of `x`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape does not fit the spec.

    Example:
        >>> import numpy as np
        >>> from nonlocal_core import init_params
        >>> spec, x = NonLocalSpec(channels=4), np.ones((1, 5, 6, 4))
        >>> bool((nonlocal_block(x, init_params(spec, np.random.default_rng(0)), spec) == x).all())
        True
    """
    check_block(x, params, spec, key_mask, training, method)
    check_numpy(method, x=x)
    wide, weights = widened(x=x)["x"], widened(**params)
    result = normalized(branch(wide, weights, spec, key_mask, method), weights, spec, training)
    result = array_namespace(x).reshape(result, x.shape)
    return narrowed(wide + result if spec.residual else result, x)  # (6)


def attention(x: Array, params: Params, spec: NonLocalSpec, positions: Any = None, key_mask: Array = None) -> Array:
    """Return rows of the weights w_ij with which a block sums its keys.

    Args:
        x: `(B, S1..Sk, C)`.
        params: the canonical parameters.
        spec: the block.
        positions: flat indices of Q queries; None: all N.
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.

    Returns:
        `(B, Q, M)` in the dtype of `x`: M counts every key of the pooled grid in row-major order, and the
        weight is 0 where a key is masked or lies outside the set of the query.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape does not fit the spec or a position is out of range.

    Example:
        >>> import numpy as np
        >>> from nonlocal_core import init_params
        >>> spec = NonLocalSpec(channels=4, subsample=2)
        >>> attention(np.ones((1, 6, 8, 4)), init_params(spec, np.random.default_rng(0)), spec, [0, 7]).shape
        (1, 2, 12)
    """
    check_block(x, params, spec, key_mask, training=False)
    xp = array_namespace(x)
    wide, weights = widened(x=x)["x"], widened(**params)
    sets = spec.sets(x.shape[1:-1])
    queries = math.prod(sets.grid)
    chosen = xp.asarray(
        range(queries) if positions is None else check_positions(positions, queries).tolist(),
        dtype=xp.__array_namespace_info__().default_dtypes()["integral"],
        device=device(x),
    )
    theta = xp.take(queries_of(xp.reshape(wide, (x.shape[0], queries, x.shape[-1])), weights, spec), chosen, axis=1)
    phi, _, valid = keys_of(wide, weights, spec, sets, key_mask)
    phi, valid = (uncut(xp, a, sets) for a in (phi, valid[..., None]))
    query_set, key_set = set_numbers(xp, sets, device(x))
    same = xp.take(query_set, chosen)[:, None] == key_set[None, :]
    return narrowed(weights_of(theta, phi, form_of(spec, weights), same[None, :, :] & valid.mT), x)


def updated_statistics(
    x: Array, params: Params, spec: NonLocalSpec, key_mask: Array = None, unbiased: bool = False
) -> dict[str, Array]:
    """Return the running statistics after one training step on `x`.

    Args:
        x: `(B, S1..Sk, C)`.
        params: the canonical parameters, with the running statistics before the step.
        spec: the block; its norm must be "batch".
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.
        unbiased: whether the variance is divided by B N - 1 (as PyTorch does) instead of B N (Keras, Flax).

    Returns:
        "norm.mean" and "norm.variance", each `(C,)`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the block has no batch norm, or a shape does not fit.

    Example:
        >>> import numpy as np
        >>> from nonlocal_core import init_params
        >>> spec = NonLocalSpec(channels=2, norm="batch", norm_momentum=0.5)
        >>> params = init_params(spec, np.random.default_rng(0))
        >>> updated_statistics(np.ones((1, 9, 2)), params, spec)["norm.variance"]
        array([0.5, 0.5])
    """
    check_statistics(spec)
    check_block(x, params, spec, key_mask, training=True)
    weights = widened(**params)
    result = branch(widened(x=x)["x"], weights, spec, key_mask)
    mean, variance = moments(result)
    count = math.prod(x.shape[:-1])
    if unbiased:
        variance = variance * (count / (count - 1))
    share = spec.norm_momentum
    new = {"norm.mean": mean, "norm.variance": variance}
    return {name: narrowed((1 - share) * weights[name] + share * new[name], params[name]) for name in new}


# The parts, in the order of the formulas; `gradients` is built on them


def branch(x: Array, params: Params, spec: NonLocalSpec, key_mask: Array, method: str = "pairwise") -> Array:
    """Return W_z y_i + b_z for every position, (B, N, C)."""
    xp = array_namespace(x)
    sets = spec.sets(x.shape[1:-1])
    theta = cut(xp, queries_of(x, params, spec), sets)
    theta = xp.reshape(theta, (theta.shape[0], sets.queries, theta.shape[-1]))
    phi, g, valid = keys_of(x, params, spec, sets, key_mask)
    y = aggregate(theta, phi, g, form_of(spec, params), valid, method)
    return project(uncut(xp, y, sets), params, "out")


def queries_of(a: Array, params: Params, spec: NonLocalSpec) -> Array:
    """Return theta (B, N, C'), or the input itself for the form without an embedding."""
    return project(a, params, "theta") if spec.has_embedding else a


def keys_of(x: Array, params: Params, spec: NonLocalSpec, sets: Sets, key_mask: Array) -> tuple[Array, Array, Array]:
    """Return phi (B', M, C'), g (B', M, C') and which keys are valid (B', M), for each set."""
    xp = array_namespace(x)
    source, mask = masked_source(x, key_mask)
    mask = cut(xp, mask, sets)
    if spec.subsample_at == "input":
        pooled, valid = pool(cut(xp, source, sets), sets, mask)
        phi = project(pooled, params, "phi") if spec.has_embedding else pooled
        return phi, project(pooled, params, "g"), valid
    phi, valid = pool(cut(xp, project(source, params, "phi") if spec.has_embedding else source, sets), sets, mask)
    return phi, pool(cut(xp, project(source, params, "g"), sets), sets, mask)[0], valid


def masked_source(x: Array, key_mask: Array) -> tuple[Array, Array]:
    """Return the input with masked positions set to 0, and the mask (B, S1..Sk, 1)."""
    xp = array_namespace(x)
    if key_mask is None:
        return x, xp.ones((*x.shape[:-1], 1), dtype=xp.bool, device=device(x))
    mask = key_mask[..., None]
    return xp.where(mask, x, xp.zeros_like(x)), mask


def pool(a: Array, sets: Sets, mask: Array) -> tuple[Array, Array]:
    """Return the largest valid value of each window (B', M, C), 0 where none is, and which are valid."""
    xp = array_namespace(a)
    windows, masks = windows_of(xp, a, sets), windows_of(xp, mask, sets)
    valid = xp.any(masks, axis=2)
    largest = xp.max(xp.where(masks, windows, xp.full_like(windows, -math.inf)), axis=2)
    return xp.where(valid, largest, xp.zeros_like(largest)), valid[..., 0]


def project(a: Array, params: Params, layer: str) -> Array:
    """Return W a + b, on the last axis."""
    product = a @ params[f"{layer}.weight"].mT
    bias = params.get(f"{layer}.bias")
    return product if bias is None else product + bias


def moments(a: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel."""
    xp = array_namespace(a)
    mean = xp.mean(a, axis=(0, 1))
    return mean, xp.mean((a - mean) ** 2, axis=(0, 1))


def normalized(a: Array, params: Params, spec: NonLocalSpec, training: bool) -> Array:
    """Return norm(a) for `(B, N, C)`."""
    if spec.norm is None:
        return a
    if spec.norm == "batch":
        mean, variance = moments(a) if training else (params["norm.mean"], params["norm.variance"])
        a = (a - mean) / (variance + spec.norm_epsilon) ** 0.5
    return a * params["norm.weight"] + params["norm.bias"]
