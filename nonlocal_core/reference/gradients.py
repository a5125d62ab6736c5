"""The gradients of the reference, written out by hand, in NumPy and float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_sizes
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.geometry import Sets, cut, uncut, windows_of
from nonlocal_core.reference.block import (
    Params,
    at_least_one,
    check_arguments,
    counted,
    finite_source,
    keys_of,
    masked_source,
    pool,
    project,
    queries_of,
    statistics_of,
)
from nonlocal_core.reference.exact import EXACT_VJP
from nonlocal_core.reference.operation import (
    Array,
    aggregate,
    narrowed,
    query_chunks,
    scores_of,
    weights_of,
    widened,
    widened_operands,
)
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_op
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.parameters import STATISTICS

__all__ = ["nonlocal_block_vjp", "nonlocal_op_vjp"]


def nonlocal_op_vjp(
    theta: Array,
    phi: Array,
    g: Array,
    dy: Array,
    pairwise: str = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: Array = None,
    concat_bias: Array = None,
    normalize: str | None = None,
    key_mask: Array = None,
    method: str = "auto",
) -> dict[str, Array]:
    """Return the gradients of sum(y * dy), y = nonlocal_op(theta, phi, g, ...).

    Args:
        theta: queries `(B, N, C')`.
        phi: keys `(B, M, C')`.
        g: values `(B, M, D)`.
        dy: the gradient of y, `(B, N, D)`.
        pairwise: a named form; this and the following are the options of `nonlocal_op`.
        scale: a finite, non-zero float, or None.
        concat_weight: w_f `(2C',)`.
        concat_bias: b_f `()`.
        normalize: None.
        key_mask: `(B, M)`, True where a key takes part.
        method: as for `nonlocal_op`.

    Returns:
        A dict with "theta", "phi", "g", and for the concatenation form "concat_weight" and, if it was given,
        "concat_bias", each in the shape and dtype of its argument.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if shapes or options do not fit each other, or `pairwise` is a function.

    Example:
        >>> theta, phi, g = np.ones((1, 2, 4)), np.ones((1, 3, 4)), np.arange(3.0).reshape(1, 3, 1)
        >>> nonlocal_op_vjp(theta, phi, g, np.ones((1, 2, 1)), pairwise="dot_product")["g"][0, :, 0]
        array([2.66666667, 2.66666667, 2.66666667])
    """
    _check_numpy(theta=theta, phi=phi, g=g, dy=dy)
    _check_named(pairwise)
    form = check_op(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    check_sizes("dy", dy.shape, (*theta.shape[:2], g.shape[-1]))
    given = {"theta": theta, "phi": phi, "g": g, "concat_weight": concat_weight, "concat_bias": concat_bias}
    theta, phi, g, form, valid = widened_operands(theta, phi, g, form, key_mask, method)
    gradients = _aggregate_vjp(theta, phi, g, widened(dy=dy)["dy"], form, valid, method)
    return {name: narrowed(gradient, given[name]) for name, gradient in gradients.items()}


def nonlocal_block_vjp(
    x: Array,
    params: Params,
    spec: NonLocalSpec,
    dz: Array,
    key_mask: Array = None,
    training: bool = False,
    *,
    method: str = "auto",
) -> tuple[Array, dict[str, Array]]:
    """Return the gradients of sum(z * dz), z = nonlocal_block(x, params, spec, key_mask, training).

    At a tie of the max pooling the gradient goes to the first position of the window in row-major order; the
    ReLU of the concatenation form has gradient 0 at 0. At a masked position whose input is not finite the
    gradient is 0, whatever `dz` is there.

    Args:
        x: `(B, S1..Sk, C)`.
        params: the canonical parameters.
        spec: the block; its form must be a named one.
        dz: the gradient of z, in the shape of `x`.
        key_mask: `(B, S1..Sk)`, True where a position serves as a key.
        training: whether batch normalisation uses the statistics of this input.
        method: how the operation is computed, see `nonlocal_op`.

    Returns:
        The gradient of `x`, and a dict with that of every parameter but the running statistics, each in the
        shape and dtype of what it belongs to.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape does not fit the spec, or `pairwise` is a function.

    Example:
        >>> from nonlocal_core import init_params
        >>> spec, x = NonLocalSpec(channels=4), np.ones((1, 5, 6, 4))
        >>> dx, dparams = nonlocal_block_vjp(x, init_params(spec, np.random.default_rng(0)), spec, np.ones_like(x))
        >>> dparams["out.bias"]
        array([30., 30., 30., 30.])
    """
    _check_numpy(x=x, dz=dz)
    check_arguments(x, params, spec, key_mask, training, method)
    _check_named(spec.pairwise)
    check_sizes("dz", dz.shape, x.shape)
    wide = widened(x=x, dz=dz)
    source, lost = finite_source(wide["x"], key_mask)
    arguments = (np.where(lost, 0.0, wide["dz"]), widened(**params), spec, key_mask, training, method)
    dx, gradients = _block_vjp(source, *arguments)
    return narrowed(dx, x), {
        name: narrowed(gradients[name], array) for name, array in params.items() if name not in STATISTICS
    }


def _block_vjp(
    x: Array, dz: Array, params: Params, spec: NonLocalSpec, key_mask: Array, training: bool, method: str
) -> tuple[Array, dict[str, Array]]:
    sets, form = spec.sets(x.shape[1:-1]), form_of(spec, params)
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    theta = _cut_queries(queries_of(flat, params, spec), sets)
    phi, g, valid = keys_of(x, params, spec, sets, key_mask)
    y = uncut(np, aggregate(theta, phi, g, form, valid, method), sets)

    dbranch, gradients = _norm_vjp(project(y, params, "out"), dz.reshape(flat.shape), params, spec, training, key_mask)
    dy, new = _project_vjp(y, dbranch, params, "out")
    gradients |= new
    inner = _aggregate_vjp(theta, phi, g, _cut_queries(dy, sets), form, valid, method)
    gradients |= {name.replace("_", "."): inner[name] for name in inner if name.startswith("concat")}

    dx = dz.reshape(flat.shape) if spec.residual else np.zeros_like(flat)
    dtheta = uncut(np, inner["theta"], sets)
    if spec.has_embedding:
        dtheta, new = _project_vjp(flat, dtheta, params, "theta")
        gradients |= new
    dsource, new = _keys_vjp(x, inner["phi"], inner["g"], params, spec, sets, key_mask)
    return (dx + dtheta + dsource).reshape(x.shape), gradients | new


def _cut_queries(a: Array, sets: Sets) -> Array:
    """Take `(B, N, C)` apart into sets, `(B', N', C)`."""
    a = cut(np, a, sets)
    return a.reshape(a.shape[0], sets.queries, a.shape[-1])


def _aggregate_vjp(
    theta: Array, phi: Array, g: Array, dy: Array, form: Form, valid: Array, method: str
) -> dict[str, Array]:
    """Return the gradients of the operation, a chunk of queries at a time."""
    phi, g = (np.where(valid[..., None], a, 0.0) for a in (phi, g))
    if method in EXACT_VJP:
        return EXACT_VJP[method](theta, phi, g, dy, form, valid)
    total: dict[str, Array] = {"theta": np.zeros_like(theta), "phi": np.zeros_like(phi), "g": np.zeros_like(g)}
    if form.concat_weight is not None:
        total["concat_weight"] = np.zeros_like(form.concat_weight)
    if form.concat_bias is not None:
        total["concat_bias"] = np.zeros_like(form.concat_bias)
    count = np.maximum(valid.sum(axis=1), 1)[:, None, None]
    for rows in query_chunks(theta, phi, form):
        queries = theta[:, rows]
        weights = weights_of(queries, phi, form, valid[:, None, :])
        total["g"] += weights.mT @ dy[:, rows]
        dweights = dy[:, rows] @ g.mT
        if form.softmax:
            dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
        else:
            dscores = np.where(valid[:, None, :], dweights, 0.0) / count
        dscores = form.scale * dscores
        if form.pairwise != "concatenation":
            total["theta"][:, rows] = dscores @ phi
            total["phi"] += dscores.mT @ queries
            continue
        active = np.where(scores_of(queries, phi, form) > 0, dscores, 0.0)
        da, db = active.sum(axis=2), active.sum(axis=1)
        for_theta, for_phi = form.halves
        total["theta"][:, rows] = da[..., None] * for_theta
        total["phi"] += db[..., None] * for_phi
        total["concat_weight"] += np.concat([np.einsum("bn,bnc->c", da, queries), np.einsum("bm,bmc->c", db, phi)])
        if form.concat_bias is not None:
            total["concat_bias"] += active.sum()
    return total


def _norm_vjp(
    a: Array, d: Array, params: Params, spec: NonLocalSpec, training: bool, key_mask: Array
) -> tuple[Array, dict[str, Array]]:
    """Return the gradients through norm(a) for `(B, N, C)`."""
    if spec.norm is None:
        return d, {}
    gamma = params["norm.weight"]
    if spec.norm == "affine":
        return d * gamma, {"norm.weight": (d * a).sum(axis=(0, 1)), "norm.bias": d.sum(axis=(0, 1))}
    mean, variance = statistics_of(a, params, training, key_mask)
    deviation = np.sqrt(variance + spec.norm_epsilon)
    normal = (a - mean) / deviation
    gradients = {"norm.weight": (d * normal).sum(axis=(0, 1)), "norm.bias": d.sum(axis=(0, 1))}
    if training:  # what the statistics pass on, to the positions from which they come
        mask = counted(a, key_mask)
        through = d.sum(axis=(0, 1)) + normal * (d * normal).sum(axis=(0, 1))
        d = d - np.where(mask, through / at_least_one(mask.sum(axis=(0, 1))), 0.0)
    return gamma / deviation * d, gradients


def _keys_vjp(
    x: Array, dphi: Array, dg: Array, params: Params, spec: NonLocalSpec, sets: Sets, key_mask: Array
) -> tuple[Array, dict[str, Array]]:
    """Return the gradients through phi, g and the pooling, (B, N, C) for the input."""
    source, mask = masked_source(x, key_mask)
    mask = cut(np, mask, sets)
    if spec.subsample_at == "input":
        grid = cut(np, source, sets)
        pooled, _ = pool(grid, sets, mask)
        dpooled, gradients = _project_vjp(pooled, dg, params, "g")
        if spec.has_embedding:
            dphi, new = _project_vjp(pooled, dphi, params, "phi")
            gradients |= new
        dsource = _pool_vjp(grid, dpooled + dphi, sets, mask)
    else:
        dg = _pool_vjp(cut(np, project(source, params, "g"), sets), dg, sets, mask)
        flat = source.reshape(*dg.shape[:2], x.shape[-1])
        dsource, gradients = _project_vjp(flat, dg, params, "g")
        keys = project(source, params, "phi") if spec.has_embedding else source
        dphi = _pool_vjp(cut(np, keys, sets), dphi, sets, mask)
        if spec.has_embedding:
            dphi, new = _project_vjp(flat, dphi, params, "phi")
            gradients |= new
        dsource = dsource + dphi
    return dsource, gradients


def _pool_vjp(a: Array, d: Array, sets: Sets, mask: Array) -> Array:
    """Return the gradient (B, N, C) of the grids `a` (B', *inner, C) whose pooled keys have the gradient `d`.

    That of an invalid key is 0, so a masked position gets none.
    """
    windows = np.where(windows_of(np, mask, sets), windows_of(np, a, sets), -np.inf)
    first = np.argmax(windows, axis=2, keepdims=True)
    scattered = np.zeros_like(windows)
    np.put_along_axis(scattered, first, d[:, :, None], axis=2)

    rank, window = len(sets.inner), sets.window or (1,) * len(sets.inner)
    scattered = scattered.reshape(a.shape[0], *sets.key_sizes, *window, a.shape[-1])
    order = [axis for size in range(1, rank + 1) for axis in (size, size + rank)]
    scattered = scattered.transpose(0, *order, 2 * rank + 1)
    covered = [size * length for size, length in zip(sets.key_sizes, window, strict=True)]
    rest = [(0, size - whole) for size, whole in zip(sets.inner_sizes, covered, strict=True)]
    grid = np.pad(scattered.reshape(a.shape[0], *covered, a.shape[-1]), [(0, 0), *rest, (0, 0)])
    return uncut(np, grid.reshape(a.shape[0], sets.queries, a.shape[-1]), sets)


def _project_vjp(a: Array, d: Array, params: Params, layer: str) -> tuple[Array, dict[str, Array]]:
    """Return the gradient of `a` and those of the layer, for W a + b on the last axis."""
    gradients = {f"{layer}.weight": np.tensordot(d, a, axes=((0, 1), (0, 1)))}
    if f"{layer}.bias" in params:
        gradients[f"{layer}.bias"] = d.sum(axis=(0, 1))
    return d @ params[f"{layer}.weight"], gradients


def _check_numpy(**arrays: Any) -> None:
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise fail_type(name, "be a NumPy array", array)


def _check_named(pairwise: Any) -> None:
    if not isinstance(pairwise, str):
        raise fail_value("pairwise", "be one of the named forms to have NumPy gradients", pairwise)
