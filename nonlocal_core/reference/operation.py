"""The operation as code: equations 1 to 5 of Wang et al. (CVPR 2018), in float64, on any array library.

Arrays are NumPy's, or those of any library that follows the array API standard; NumPy in float64 is the
definition. Nothing is written in place. The matrix of weights exists for one chunk of queries at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from nonlocal_core.errors import fail_type
from nonlocal_core.reference.exact import EXACT
from nonlocal_core.spec.calls import check_op, check_scores
from nonlocal_core.spec.form import Form

__all__ = ["nonlocal_op"]

Array = Any

CHUNK = 2**18
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
        method: "auto" and "pairwise" are the definition, a chunk of queries at a time; with NumPy arrays also the
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
    form = check_op(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    return narrowed(aggregate(*widened_operands(theta, phi, g, form, key_mask, method), method), theta)


# The parts, in the order of the formulas; `gradients` is built on them


def scores_of(theta: Array, phi: Array, form: Form) -> Array:
    """Return the scores s_ij before the scale, (B, N, M); the forms of the paper are f_ij = e^s_ij or s_ij."""
    if not isinstance(form.pairwise, str):
        return check_scores(form.pairwise(theta, phi), theta, phi)
    if form.pairwise != "concatenation":
        return theta @ phi.mT  # (2) of x itself, (3) and (4) of its projections
    a, b = form.summands(theta, phi)
    total = a[:, :, None] + b[:, None, :]
    xp = array_namespace(theta)
    return xp.where(total > 0, total, xp.zeros_like(total))  # (5)


def weights_of(theta: Array, phi: Array, form: Form, valid: Array) -> Array:
    """Return the weights w_ij = f_ij / C_i (B, N, M); `valid` is (B, 1 or N, M)."""
    xp = array_namespace(theta)
    scores = form.scale * scores_of(theta, phi, form)
    nothing = xp.zeros_like(scores)
    if not form.softmax:
        count = xp.sum(xp.astype(valid, scores.dtype), axis=-1, keepdims=True)
        return xp.where(valid, scores, nothing) / xp.where(count > 0, count, xp.ones_like(count))  # C = M
    scores = xp.where(valid, scores, xp.full_like(scores, -math.inf))
    largest = xp.max(scores, axis=-1, keepdims=True)
    shifted = scores - xp.where(largest == -math.inf, xp.zeros_like(largest), largest)
    exponentials = xp.exp(shifted)
    total = xp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / xp.where(total > 0, total, xp.ones_like(total))  # C_i = sum_j f_ij


def aggregate(theta: Array, phi: Array, g: Array, form: Form, valid: Array, method: str) -> Array:
    """Return y_i = sum_j w_ij g_j (B, N, D), by definition a chunk of queries at a time; `valid` is (B, M)."""
    xp = array_namespace(theta)
    phi, g = (xp.where(valid[..., None], a, xp.zeros_like(a)) for a in (phi, g))
    if method in EXACT:
        return EXACT[method](theta, phi, g, form, valid)
    chunks = [
        weights_of(theta[:, rows, :], phi, form, valid[:, None, :]) @ g  # (1)
        for rows in query_chunks(theta, phi, form)
    ]
    return xp.concat(chunks, axis=1)


def query_chunks(theta: Array, phi: Array, form: Form) -> Iterator[slice]:
    """Cut the queries into chunks of at most `CHUNK` weights; a function of the user's gets them whole."""
    queries = theta.shape[1]
    step = max(1, CHUNK // max(1, phi.shape[0] * phi.shape[1])) if form.is_named else queries
    # Without any query there is one chunk, which is empty.
    return (slice(start, min(start + step, queries)) for start in range(0, max(queries, 1), step))


def widened_operands(
    theta: Array, phi: Array, g: Array, form: Form, key_mask: Array, method: str
) -> tuple[Array, Array, Array, Form, Array]:
    """Check the libraries of the arrays; return them and those of the form widened, and which keys are valid."""
    concat = {"concat_weight": form.concat_weight, "concat_bias": form.concat_bias}
    check_library(theta=theta, phi=phi, g=g, key_mask=key_mask, **concat)
    check_numpy(method, theta=theta)
    xp = array_namespace(phi)
    valid = xp.ones(phi.shape[:2], dtype=xp.bool, device=device(phi)) if key_mask is None else key_mask
    wide = widened(**{name: a for name, a in concat.items() if a is not None})
    arrays = widened(theta=theta, phi=phi, g=g)
    return arrays["theta"], arrays["phi"], arrays["g"], dataclasses.replace(form, **wide), valid


def check_library(**arrays: Array) -> None:
    """Check that all arrays but None are of the library of the first, one that follows the array API standard."""
    first = next(iter(arrays))
    for name, array in arrays.items():
        if array is None:
            continue
        if not is_array_api_obj(array):
            raise fail_type(name, "be an array of a library that follows the array API standard", array)
        if array_namespace(array) is not array_namespace(arrays[first]):
            raise fail_type(name, f"be an array of the same library as `{first}`", array)


def check_numpy(method: str, **arrays: Array) -> None:
    """Check that arrays are NumPy's, on which alone the core has the methods without the matrix."""
    for name, array in arrays.items():
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
