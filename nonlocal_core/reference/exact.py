"""The exact methods that never hold the N x M matrix of weights, in NumPy: rearrangements, not approximations.

Arrays are in float64, and keys and values are 0 where `valid` is False.

- streamed, for the softmax forms: the keys pass in chunks, with the largest score, the sum of exponentials and the
  weighted sum of the values so far. The reference's gradients are made a chunk of queries at a time as it is.
- reassociated, for the dot product: theta (phi^T g) instead of (theta phi^T) g, where that is cheaper.
- sorted, for the concatenation: with a_i = w_theta . theta_i + b_f and b_j = w_phi . phi_j the score ReLU(a_i + b_j)
  is zero unless b_j > -a_i. With the keys in descending order of b, those that count are the first k_i, so
  sum_j s_ij g_j = a_i G[k_i] + H[k_i], with the prefix sums G of g_j and H of b_j g_j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nonlocal_core.planning import keys_first
from nonlocal_core.spec.form import Form

__all__ = ["EXACT", "EXACT_VJP"]

Array = Any
Gradients = dict[str, Array]

CHUNK = 512
"""How many queries, and how many keys, pass at once: their scores fit a processor's cache."""


def streamed(theta: Array, phi: Array, g: Array, form: Form, valid: Array) -> Array:
    """Return y (B, N, D): for each chunk of queries a running softmax over chunks of keys."""
    y = np.empty((*theta.shape[:2], g.shape[2]))
    for queries in _chunks(theta):
        query = form.scale * theta[:, queries]
        largest, total, sums = np.full((*query.shape[:2], 1), -np.inf), 0.0, 0.0
        for keys in _chunks(phi):
            scores = np.where(valid[:, None, keys], query @ phi[:, keys].mT, -np.inf)
            previous, largest = largest, np.maximum(largest, scores.max(axis=-1, keepdims=True))
            shift = np.where(largest == -np.inf, 0.0, largest)  # no valid key yet
            weights, kept = np.exp(scores - shift), np.exp(previous - shift)
            total = kept * total + weights.sum(axis=-1, keepdims=True)
            sums = kept * sums + weights @ g[:, keys]
        y[:, queries] = sums / np.where(total > 0, total, 1.0)
    return y


def reassociated(theta: Array, phi: Array, g: Array, form: Form, valid: Array) -> Array:
    """Return y (B, N, D), by the cheaper order of the two products."""
    scale = form.scale / _count(valid)
    if keys_first(theta.shape[1], phi.shape[1], phi.shape[2], g.shape[2]):
        return scale * (theta @ (phi.mT @ g))
    return scale * ((theta @ phi.mT) @ g)


def reassociated_vjp(theta: Array, phi: Array, g: Array, dy: Array, form: Form, valid: Array) -> Gradients:
    """Return the gradients of `reassociated`."""
    dy = form.scale / _count(valid) * dy
    if keys_first(theta.shape[1], phi.shape[1], phi.shape[2], g.shape[2]):
        dproduct = theta.mT @ dy
        return {"theta": dy @ (phi.mT @ g).mT, "phi": g @ dproduct.mT, "g": phi @ dproduct}
    dweights = dy @ g.mT
    return {"theta": dweights @ phi, "phi": dweights.mT @ theta, "g": (theta @ phi.mT).mT @ dy}


def sorted_(theta: Array, phi: Array, g: Array, form: Form, valid: Array) -> Array:
    """Return y (B, N, D), from prefix sums over the sorted keys."""
    a, b = _centred(theta, phi, form, valid)
    sums = active_sums(a, b, np.concat([g, b[..., None] * g], axis=-1))
    plain, weighted = np.split(sums, 2, axis=-1)
    return form.scale / _count(valid) * (a[..., None] * plain + weighted)


def sorted_vjp(theta: Array, phi: Array, g: Array, dy: Array, form: Form, valid: Array) -> Gradients:
    """Return the gradients of `sorted_`: with queries and keys exchanged they are sums of the same kind."""
    a, b = _centred(theta, phi, form, valid)
    dy = form.scale / _count(valid) * dy
    plain, weighted = np.split(active_sums(b, a, np.concat([dy, a[..., None] * dy], axis=-1)), 2, axis=-1)
    da, db = (dy * active_sums(a, b, g)).sum(axis=-1), (g * plain).sum(axis=-1)
    for_theta, for_phi = form.halves
    gradients = {
        "theta": da[..., None] * for_theta,
        "phi": db[..., None] * for_phi,
        "g": np.where(valid[..., None], b[..., None] * plain + weighted, 0.0),
        "concat_weight": np.concat([np.einsum("bn,bnc->c", da, theta), np.einsum("bm,bmc->c", db, phi)]),
    }
    return gradients if form.concat_bias is None else gradients | {"concat_bias": da.sum()}


def active_sums(a: Array, b: Array, values: Array) -> Array:
    """Return for each i the sum of values_j over the j with a_i + b_j > 0: `(B, N), (B, M), (B, M, D)` -> `(B, N, D)`.

    It is linear in `values`, and its transpose is the same sum with `a` and `b` exchanged.
    """
    order = np.argsort(-b, axis=1, stable=True)
    falling = np.take_along_axis(b, order, axis=1)
    prefix = np.cumsum(np.take_along_axis(values, order[..., None], axis=1), axis=1)
    prefix = np.pad(prefix, ((0, 0), (1, 0), (0, 0)))  # that of no key comes first
    counts = np.empty(a.shape, np.int64)
    for count, queries, keys in zip(counts, a, falling, strict=True):
        count[:] = np.searchsorted(-keys, queries)
    return np.take_along_axis(prefix, counts[..., None], axis=1)


def _chunks(a: Array) -> Iterator[slice]:
    """Cut the positions of `(B, N, C')` into chunks."""
    return (slice(start, start + CHUNK) for start in range(0, a.shape[1], CHUNK))


def _centred(theta: Array, phi: Array, form: Form, valid: Array) -> tuple[Array, Array]:
    """Return a (B, N) and b (B, M), moved by the median of the valid b: the scores stay, less is lost to rounding."""
    a, b = form.summands(theta, phi)
    rising = np.sort(np.where(valid, b, np.inf), axis=1)
    middle = np.take_along_axis(rising, valid.sum(axis=1, keepdims=True) // 2, axis=1)
    centre = np.where(valid.any(axis=1, keepdims=True), middle, 0.0)
    return a + centre, np.where(valid, b - centre, 0.0)


def _count(valid: Array) -> Array:
    """Return the number of valid keys (B, 1, 1), at least 1."""
    return np.maximum(valid.sum(axis=1), 1)[:, None, None]


EXACT: dict[str, Callable[..., Array]] = {"streamed": streamed, "reassociated": reassociated, "sorted": sorted_}
"""The methods by name: `(theta, phi, g, form, valid)` -> y."""

EXACT_VJP: dict[str, Callable[..., Gradients]] = {"reassociated": reassociated_vjp, "sorted": sorted_vjp}
"""The gradients by name: `(theta, phi, g, dy, form, valid)` -> a dict; those of "streamed" are the reference's."""
