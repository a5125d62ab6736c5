"""The block as code: equation 6 of Wang et al. (CVPR 2018) around the operation, in float64, on any array library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from array_api_compat import array_namespace, device

from nonlocal_core.arguments import check_positions
from nonlocal_core.geometry import Sets, among_all_keys, cut, set_numbers, uncut, windows_of
from nonlocal_core.reference.operation import aggregate, check_library, check_numpy, narrowed, weights_of, widened
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
        z, with the shape and the dtype of `x`. A masked position whose input is not finite counts as 0 in
        everything, and its z is NaN.

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
    check_arguments(x, params, spec, key_mask, training, method)
    xp, weights = array_namespace(x), widened(**params)
    source, lost = finite_source(widened(x=x)["x"], key_mask)
    result = normalized(branch(source, weights, spec, key_mask, method), weights, spec, training, key_mask)
    result = xp.reshape(result, x.shape)
    z = source + result if spec.residual else result  # (6)
    return narrowed(xp.where(lost, xp.full_like(z, math.nan), z), x)


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
        weight is 0 where a key is masked or lies outside the set of the query. The row of a masked position
        whose input is not finite is NaN.

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
    check_arguments(x, params, spec, key_mask, training=False)
    xp, weights = array_namespace(x), widened(**params)
    source, lost = finite_source(widened(x=x)["x"], key_mask)
    sets = spec.sets(x.shape[1:-1])
    queries = math.prod(sets.grid)
    chosen = xp.asarray(
        range(queries) if positions is None else check_positions(positions, queries).tolist(),
        dtype=xp.__array_namespace_info__().default_dtypes()["integral"],
        device=device(x),
    )
    lost = xp.take(xp.reshape(lost, (x.shape[0], queries, 1)), chosen, axis=1)
    theta, form = queries_of(source, weights, spec), form_of(spec, weights)
    phi, _, valid = keys_of(source, weights, spec, sets, key_mask)
    if form.is_named:
        theta = xp.take(xp.reshape(theta, (x.shape[0], queries, theta.shape[-1])), chosen, axis=1)
        phi, valid = (uncut(xp, a, sets) for a in (phi, valid[..., None]))
        query_set, key_set = set_numbers(xp, sets, device(x))
        same = xp.take(query_set, chosen)[:, None] == key_set[None, :]
        rows = weights_of(theta, phi, form, same[None, :, :] & valid.mT)
    else:  # a function gets what it gets in `branch`: all queries and keys of a set
        own = weights_of(cut_queries(theta, sets), phi, form, valid[:, None, :])
        rows = xp.take(among_all_keys(xp, own, sets, device(x)), chosen, axis=1)
    return narrowed(xp.where(lost, xp.full_like(rows, math.nan), rows), x)


def updated_statistics(
    x: Array, params: Params, spec: NonLocalSpec, key_mask: Array = None, unbiased: bool = False
) -> dict[str, Array]:
    """Return the running statistics after one training step on `x`, from the positions that are not masked.

    Without any such position they stay.

    Args:
        x: `(B, S1..Sk, C)`.
        params: the canonical parameters, with the running statistics before the step.
        spec: the block; its norm must be "batch".
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.
        unbiased: whether the variance is divided by the number of positions less 1, at least 1 (as PyTorch does),
            instead of their number (Keras, Flax).

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
    check_statistics(spec, unbiased)
    check_arguments(x, params, spec, key_mask, training=True)
    weights = widened(**params)
    source, _ = finite_source(widened(x=x)["x"], key_mask)
    mean, variance, count = moments(branch(source, weights, spec, key_mask), key_mask)
    if unbiased:
        variance = variance * (count / at_least_one(count - 1))
    share = spec.norm_momentum * array_namespace(x).astype(count > 0, count.dtype)
    new = {"norm.mean": mean, "norm.variance": variance}
    return {name: narrowed((1 - share) * weights[name] + share * new[name], params[name]) for name in new}


def check_arguments(
    x: Array, params: Params, spec: NonLocalSpec, key_mask: Array, training: bool, method: str = "auto"
) -> None:
    """Check the arguments of a block, and that its arrays are of one library."""
    check_block(x, params, spec, key_mask, training, method)
    check_numpy(method, x=x)
    check_library(x=x, key_mask=key_mask, **{f"params[{name!r}]": array for name, array in params.items()})


# The parts, in the order of the formulas; `gradients` is built on them


def branch(x: Array, params: Params, spec: NonLocalSpec, key_mask: Array, method: str = "pairwise") -> Array:
    """Return W_z y_i + b_z for every position, (B, N, C)."""
    xp = array_namespace(x)
    sets = spec.sets(x.shape[1:-1])
    theta = cut_queries(queries_of(x, params, spec), sets)
    phi, g, valid = keys_of(x, params, spec, sets, key_mask)
    y = aggregate(theta, phi, g, form_of(spec, params), valid, method)
    return project(uncut(xp, y, sets), params, "out")


def queries_of(a: Array, params: Params, spec: NonLocalSpec) -> Array:
    """Return theta (B, S1..Sk, C'), or the input itself for the form without an embedding."""
    return project(a, params, "theta") if spec.has_embedding else a


def cut_queries(theta: Array, sets: Sets) -> Array:
    """Return theta (B, S1..Sk, C') as that of each set, (B', N', C')."""
    theta = cut(array_namespace(theta), theta, sets)
    return array_namespace(theta).reshape(theta, (theta.shape[0], sets.queries, theta.shape[-1]))


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


def mask_of(x: Array, key_mask: Array) -> Array:
    """Return which positions are not masked (B, S1..Sk, 1)."""
    xp = array_namespace(x)
    return xp.ones((*x.shape[:-1], 1), dtype=xp.bool, device=device(x)) if key_mask is None else key_mask[..., None]


def finite_source(x: Array, key_mask: Array) -> tuple[Array, Array]:
    """Return the input with 0 in each masked row that is not finite, and which rows these are (B, S1..Sk, 1)."""
    xp = array_namespace(x)
    lost = ~(mask_of(x, key_mask) | xp.all(xp.isfinite(x), axis=-1, keepdims=True))
    return xp.where(lost, xp.zeros_like(x), x), lost


def masked_source(x: Array, key_mask: Array) -> tuple[Array, Array]:
    """Return the input with masked positions set to 0, and the mask (B, S1..Sk, 1)."""
    xp, mask = array_namespace(x), mask_of(x, key_mask)
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


def moments(a: Array, key_mask: Array) -> tuple[Array, Array, Array]:
    """Return mean and biased variance (C,) of the positions of `(B, N, C)` that count, and their number (1,)."""
    xp = array_namespace(a)
    mask = counted(a, key_mask)
    count = xp.sum(xp.astype(mask, a.dtype), axis=(0, 1))

    def mean_of(values: Array) -> Array:
        return xp.sum(xp.where(mask, values, xp.zeros_like(values)), axis=(0, 1)) / at_least_one(count)

    mean = mean_of(a)
    return mean, mean_of((a - mean) ** 2), count


def counted(a: Array, key_mask: Array) -> Array:
    """Return which positions of `(B, N, C)` count in the statistics (B, N, 1): those that are not masked."""
    return mask_of(a, None if key_mask is None else array_namespace(a).reshape(key_mask, a.shape[:-1]))


def at_least_one(count: Array) -> Array:
    """Return a count as a divisor."""
    xp = array_namespace(count)
    return xp.where(count > 0, count, xp.ones_like(count))


def statistics_of(a: Array, params: Params, training: bool, key_mask: Array) -> tuple[Array, Array]:
    """Return the mean and the variance that normalise: in training those of `a`, unless every position is masked."""
    running = params["norm.mean"], params["norm.variance"]
    if not training:
        return running
    *own, count = moments(a, key_mask)
    mean, variance = (array_namespace(a).where(count > 0, *pair) for pair in zip(own, running, strict=True))
    return mean, variance


def normalized(a: Array, params: Params, spec: NonLocalSpec, training: bool, key_mask: Array) -> Array:
    """Return norm(a) for `(B, N, C)`."""
    if spec.norm is None:
        return a
    if spec.norm == "batch":
        mean, variance = statistics_of(a, params, training, key_mask)
        a = (a - mean) / (variance + spec.norm_epsilon) ** 0.5
    return a * params["norm.weight"] + params["norm.bias"]
