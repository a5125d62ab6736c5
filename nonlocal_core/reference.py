"""The specification as code: equations 1 to 6 of Wang et al. (CVPR 2018), in float64, on any array library.

Arrays are NumPy's, or those of any library that follows the array API standard; NumPy in float64 is the
definition. Nothing is written in place. The matrix of weights exists for one block of queries at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from nonlocal_core.checks import check_array, check_arrays, check_op, check_params, check_positions
from nonlocal_core.errors import fail_type
from nonlocal_core.exact import EXACT
from nonlocal_core.form import Form, form_of
from nonlocal_core.planning import check_method
from nonlocal_core.sets import Sets
from nonlocal_core.spec import NonLocalSpec

__all__ = ["attention", "nonlocal_block", "nonlocal_op", "updated_statistics"]

Array = Any
Params = Mapping[str, Any]

BLOCK = 2**18
"""The largest number of weights that are held at once."""


def nonlocal_op(
    theta: Array,
    phi: Array,
    g: Array,
    pairwise: str | Callable[[Array, Array], Array] = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: Array = None,
    concat_bias: Array = None,
    normalize: str | None = None,
    key_mask: Array = None,
    method: str = "auto",
) -> Array:
    """Compute the non-local operation, y_i = sum_j w_ij g_j (equation 1).

    The weights w_ij are the softmax over j of a s_ij, or a s_ij / M, with s_ij = theta_i . phi_j for the
    Gaussian forms (equations 2 and 3) and the dot product (equation 4), ReLU(w_f . [theta_i; phi_j] + b_f)
    for the concatenation (equation 5), and a the scale.

    Args:
        theta: queries `(B, N, C')`; for the form "gaussian", the input itself.
        phi: keys `(B, M, C')`.
        g: values `(B, M, D)`.
        pairwise: "gaussian", "embedded_gaussian", "dot_product", "concatenation", or a function
            `f(theta, phi) -> scores (B, N, M)` of each pair alone.
        scale: a, a finite, non-zero float; None is 1.
        concat_weight: w_f `(2C',)`, the half for theta first; for the concatenation form.
        concat_bias: b_f `()`; for the concatenation form, optional.
        normalize: "softmax" or "count" for a function, None for the named forms.
        key_mask: `(B, M)`, True where a key takes part. A query without any key gives 0.
        method: "auto" and "pairwise" are the definition, a block of queries at a time; with NumPy arrays also the
            method without the matrix that serves the form: "streamed", "reassociated" or "sorted".

    Returns:
        y `(B, N, D)` in the dtype of `theta`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if shapes or options do not fit each other.

    Example:
        >>> import numpy as np
        >>> theta, phi, g = np.ones((1, 2, 4)), np.ones((1, 3, 4)), np.arange(3.0).reshape(1, 3, 1)
        >>> nonlocal_op(theta, phi, g)[0, :, 0]
        array([1., 1.])
    """
    form, mask = op_form(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    wide = widened(theta=theta, phi=phi, g=g)
    return narrowed(aggregate(wide["theta"], wide["phi"], wide["g"], form, mask, method), theta)


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
    _check_numpy("x", x, method)
    wide, weights = widened(x=x)["x"], widened(**params)
    result = normalized(branch(wide, weights, spec, key_mask, method), weights, spec, training)
    result = array_namespace(x).reshape(result, x.shape)
    return narrowed(wide + result if spec.residual else result, x)


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


def project(a: Array, params: Params, layer: str) -> Array:
    """Return W a + b, on the last axis."""
    product = a @ params[f"{layer}.weight"].mT
    bias = params.get(f"{layer}.bias")
    return product if bias is None else product + bias


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


def cut(xp: Any, a: Array, sets: Sets) -> Array:
    """Take `(B, S1..Sk, C)` apart into sets, `(B', *inner, C)`."""
    a = xp.permute_dims(xp.reshape(a, (a.shape[0], *sets.grid, a.shape[-1])), sets.cut_axes)
    return xp.reshape(a, (a.shape[0] * sets.count, *sets.inner_sizes, a.shape[-1]))


def uncut(xp: Any, a: Array, sets: Sets) -> Array:
    """Put the queries or the keys of all sets, `(B', N', C)`, back in row-major order, `(B, N, C)`."""
    inner = sets.inner_sizes if a.shape[1] == sets.queries else sets.key_sizes
    batch = a.shape[0] // sets.count
    a = xp.permute_dims(xp.reshape(a, (batch, *sets.outer_sizes, *inner, a.shape[-1])), sets.uncut_axes)
    return xp.reshape(a, (batch, sets.count * math.prod(inner), a.shape[-1]))


def windows_of(xp: Any, a: Array, sets: Sets) -> Array:
    """Return the pooling windows of `(B', *inner, C)` as `(B', M, K, C)`; a remainder is dropped."""
    rank, window = len(sets.inner), sets.window or (1,) * len(sets.inner)
    pairs = list(zip(sets.key_sizes, window, strict=True))
    for axis, (size, length) in enumerate(pairs, start=1):
        a = a[(slice(None),) * axis + (slice(size * length), ...)]
    a = xp.reshape(a, (a.shape[0], *itertools.chain(*pairs), a.shape[-1]))
    a = xp.permute_dims(a, (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1))
    return xp.reshape(a, (a.shape[0], sets.keys, math.prod(window), a.shape[-1]))


def pool(a: Array, sets: Sets, mask: Array) -> tuple[Array, Array]:
    """Return the largest valid value of each window (B', M, C), 0 where none is, and which are valid."""
    xp = array_namespace(a)
    windows, masks = windows_of(xp, a, sets), windows_of(xp, mask, sets)
    valid = xp.any(masks, axis=2)
    largest = xp.max(xp.where(masks, windows, xp.full_like(windows, -math.inf)), axis=2)
    return xp.where(valid, largest, xp.zeros_like(largest)), valid[..., 0]


def scores_of(theta: Array, phi: Array, form: Form) -> Array:
    """Return the scores s_ij before the scale, (B, N, M)."""
    if not isinstance(form.pairwise, str):
        return form.pairwise(theta, phi)
    if form.pairwise != "concatenation":
        return theta @ phi.mT
    half = theta.shape[-1]
    a, b = theta @ form.concat_weight[:half], phi @ form.concat_weight[half:]
    total = a[:, :, None] + b[:, None, :]
    if form.concat_bias is not None:
        total = total + form.concat_bias
    xp = array_namespace(theta)
    return xp.where(total > 0, total, xp.zeros_like(total))


def weights_of(theta: Array, phi: Array, form: Form, valid: Array) -> Array:
    """Return the weights w_ij (B, N, M); `valid` is (B, 1 or N, M)."""
    xp = array_namespace(theta)
    scores = form.scale * scores_of(theta, phi, form)
    nothing = xp.zeros_like(scores)
    if not form.softmax:
        count = xp.sum(xp.astype(valid, scores.dtype), axis=-1, keepdims=True)
        return xp.where(valid, scores, nothing) / xp.where(count > 0, count, xp.ones_like(count))
    scores = xp.where(valid, scores, xp.full_like(scores, -math.inf))
    largest = xp.max(scores, axis=-1, keepdims=True)
    shifted = scores - xp.where(largest == -math.inf, xp.zeros_like(largest), largest)
    exponentials = xp.exp(shifted)
    total = xp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / xp.where(total > 0, total, xp.ones_like(total))


def aggregate(theta: Array, phi: Array, g: Array, form: Form, valid: Array, method: str) -> Array:
    """Return y_i = sum_j w_ij g_j (B, N, D), by definition a block of queries at a time; `valid` is (B, M)."""
    xp = array_namespace(theta)
    phi, g = (xp.where(valid[..., None], a, xp.zeros_like(a)) for a in (phi, g))
    if method in EXACT:
        return EXACT[method](theta, phi, g, form, valid)
    blocks = [
        weights_of(theta[:, rows, :], phi, form, valid[:, None, :]) @ g for rows in query_blocks(theta, phi, form)
    ]
    return xp.concat(blocks, axis=1)


def query_blocks(theta: Array, phi: Array, form: Form) -> Iterator[slice]:
    """Cut the queries into blocks of at most `BLOCK` weights; a function of the user's gets them whole."""
    queries = theta.shape[1]
    step = max(1, BLOCK // max(1, phi.shape[0] * phi.shape[1])) if form.named else queries
    # Without any query there is one block, which is empty.
    return (slice(start, min(start + step, queries)) for start in range(0, max(queries, 1), step))


def branch(x: Array, params: Params, spec: NonLocalSpec, key_mask: Array, method: str = "pairwise") -> Array:
    """Return W_z y_i + b_z for every position, (B, N, C)."""
    xp = array_namespace(x)
    sets = spec.sets(x.shape[1:-1])
    theta = cut(xp, queries_of(x, params, spec), sets)
    theta = xp.reshape(theta, (theta.shape[0], sets.queries, theta.shape[-1]))
    phi, g, valid = keys_of(x, params, spec, sets, key_mask)
    y = aggregate(theta, phi, g, form_of(spec, params), valid, method)
    return project(uncut(xp, y, sets), params, "out")


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


def set_numbers(xp: Any, sets: Sets, where: Any) -> tuple[Array, Array]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = xp.arange(sets.count, device=where)[:, None, None]
    sizes = (sets.queries, sets.keys)
    queries, keys = (uncut(xp, xp.broadcast_to(numbers, (sets.count, size, 1)), sets)[0, :, 0] for size in sizes)
    return queries, keys


def check_block(
    x: Array, params: Params, spec: NonLocalSpec, key_mask: Array, training: bool, method: str = "auto"
) -> None:
    """Check the arguments of a block."""
    check_array("x", x)
    check_spec(spec)
    check_method(method, spec.pairwise)
    check_arrays(spec, x.shape, x, key_mask, training=training)
    check_params(params, spec)


def check_spec(spec: Any) -> None:
    """Check that an argument is a spec."""
    if not isinstance(spec, NonLocalSpec):
        raise fail_type("spec", "be a NonLocalSpec", spec)


def check_statistics(spec: NonLocalSpec) -> None:
    """Check that a block has running statistics."""
    check_spec(spec)
    if spec.norm != "batch":
        message = f"`spec` must have norm 'batch' to have statistics. Got norm {spec.norm!r}."
        raise ValueError(message)


def op_form(theta: Array, phi: Array, g: Array, *options: Any) -> tuple[Form, Array]:
    """Check the arguments of the operation, in their order; return its form and a mask (B, M)."""
    for name, a in (("theta", theta), ("phi", phi), ("g", g)):
        check_array(name, a)
        if not is_array_api_obj(a):
            raise fail_type(name, "be an array of a library that follows the array API standard", a)
    form, mask, method = check_op(theta, phi, g, *options), *options[5:]
    _check_numpy("theta", theta, method)
    if mask is None:
        xp = array_namespace(phi)
        mask = xp.ones(phi.shape[:2], dtype=xp.bool, device=device(phi))
    given = {"concat_weight": form.concat_weight, "concat_bias": form.concat_bias}
    wide = widened(**{name: a for name, a in given.items() if a is not None})
    return dataclasses.replace(form, **wide), mask


def _check_numpy(name: str, array: Array, method: str) -> None:
    """Check that an array is NumPy's, on which alone the core has the methods without the matrix."""
    if method in EXACT and not isinstance(array, np.ndarray):
        raise fail_type(name, f"be a NumPy array for the method {method!r}", array)


def widened(**arrays: Array) -> dict[str, Array]:
    """Return the arrays in the widest real dtype of their library."""
    if not arrays:
        return {}
    xp = array_namespace(*arrays.values())
    widest = xp.__array_namespace_info__().dtypes(kind="real floating")
    dtype = widest.get("float64", widest["float32"])
    return {name: xp.astype(a, dtype) for name, a in arrays.items()}


def narrowed(a: Array, like: Array) -> Array:
    """Return `a` in the dtype of `like`."""
    return array_namespace(a).astype(a, like.dtype)
