"""A bound on the error that operands of few digits make, to first order, one for each value of the output."""

from __future__ import annotations

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.cases import Array, Case, Data
from nonlocal_core.geometry import cut, set_numbers, uncut, windows_of
from nonlocal_core.reference.block import keys_of, project, queries_of
from nonlocal_core.spec.form import form_of

__all__ = ["UNITS", "attention_bound", "output_bound"]

UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tensorfloat32": 2.0**-11}
"""Half of the distance from 1 to the next number: what one rounding changes at most, relatively."""

HIGHER_ORDERS = 1.25
"""What the orders above the first may add."""

SMALLEST = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "tensorfloat32": 2.0**-136}
"""The smallest positive number: what a rounding near zero changes at most, absolutely."""


def output_bound(case: Case, data: Data, dtype: str) -> Array:
    """Return how far z may be from the reference if operands are rounded to `dtype`.

    Every operand of a product (the input, the weights of the layers, theta, phi, g, y and the result of a layer)
    is rounded once, where it is stored or multiplied; scores, weights and sums are float32, whose rounding is far
    smaller. Weights may be rounded once more before they meet g, as fused kernels do.

    Args:
        case: an evaluation case with a named form.
        data: its arrays in float64.
        dtype: one of `UNITS`.

    Returns:
        An array in the shape of z.
    """
    u, spec = UNITS[dtype], case.spec
    magnitude = {name: np.abs(a) for name, a in data.params.items()}
    weights, weight_error, g, g_error = _weights_and_values(case, data, magnitude, u)
    y = weights @ g
    y_error = weight_error @ np.abs(g) + np.abs(weights) @ g_error + u * np.abs(y)
    r_error = _layer_error(magnitude, u, y, y_error, "out")
    if spec.norm is not None:
        variance = data.params.get("norm.variance", 1.0 - spec.norm_epsilon)
        r = project(y, data.params, "out")
        mean = data.params.get("norm.mean", 0.0)
        factor = magnitude["norm.weight"] / np.sqrt(variance + spec.norm_epsilon)
        r_error = factor * (r_error + 2 * u * (np.abs(r) + np.abs(mean))) + 2 * u * magnitude["norm.bias"]
    z = nlc.nonlocal_block(data.x, data.params, spec, data.key_mask)
    smallest = SMALLEST[dtype] * spec.channels
    return HIGHER_ORDERS * r_error.reshape(z.shape) + 2.0**-22 * np.abs(z) + smallest


def attention_bound(case: Case, data: Data, dtype: str) -> Array:
    """Return how far each weight (B, N, M) may be from the reference if operands are rounded to `dtype`."""
    magnitude = {name: np.abs(a) for name, a in data.params.items()}
    _, error, _, _ = _weights_and_values(case, data, magnitude, UNITS[dtype])
    return HIGHER_ORDERS * error + SMALLEST[dtype]


def _layer_error(magnitude: dict[str, Array], u: float, a: Array, error: Array, layer: str) -> Array:
    """Bound W a + b: the roundings of W, a, b and the result, and the error that `a` brought along."""
    terms = project(np.abs(a), magnitude, layer)
    return 3 * u * terms + error @ magnitude[f"{layer}.weight"].mT


def _weights_and_values(
    case: Case, data: Data, magnitude: dict[str, Array], u: float
) -> tuple[Array, Array, Array, Array]:
    """Return the weights and the pooled g, each with a bound on its error."""
    spec = case.spec
    sets = spec.sets(case.spatial)
    flat = data.x.reshape(case.batch, -1, spec.channels)
    theta = queries_of(flat, data.params, spec)
    theta_error = _layer_error(magnitude, u, flat, 0 * flat, "theta") if spec.has_embedding else u * np.abs(flat)

    # Of a window any position may become the largest: its error is the largest of the window.
    phi, g, valid = (uncut(np, a, sets) for a in _with_axis(keys_of(data.x, data.params, spec, sets, data.key_mask)))
    errors = {"g": _layer_error(magnitude, u, flat, 0 * flat, "g")}
    errors["phi"] = _layer_error(magnitude, u, flat, 0 * flat, "phi") if spec.has_embedding else u * np.abs(flat)
    grid = (case.batch, *case.spatial, -1)
    pooled = {
        name: uncut(np, windows_of(np, cut(np, e.reshape(grid), sets), sets).max(axis=2), sets)
        for name, e in errors.items()
    }
    weights = nlc.attention(data.x, data.params, spec, key_mask=data.key_mask)
    score_error = abs(spec.scale_factor) * _score_error(case, data, theta, theta_error, phi, pooled["phi"], u)
    if spec.is_softmax:
        weight_error = weights * (score_error + (weights * score_error).sum(axis=-1, keepdims=True)) + 2 * u * weights
    else:
        same = _same_set(case)
        count = np.maximum((valid.mT & same).sum(axis=-1, keepdims=True), 1)
        weight_error = np.where(valid.mT & same, score_error, 0.0) / count + u * np.abs(weights)
    return weights, weight_error, g, pooled["g"]


def _with_axis(keys: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    phi, g, valid = keys
    return phi, g, valid[..., None]


def _same_set(case: Case) -> Array:
    """Return which keys lie in the set of each query, (1, N, M)."""
    queries, keys = set_numbers(np, case.spec.sets(case.spatial), None)
    return (queries[:, None] == keys)[None]


def _score_error(
    case: Case, data: Data, theta: Array, theta_error: Array, phi: Array, phi_error: Array, u: float
) -> Array:
    """Bound the scores before the scale, (B, N, M)."""
    if case.spec.pairwise != "concatenation":
        return theta_error @ np.abs(phi).mT + np.abs(theta) @ phi_error.mT
    form = form_of(case.spec, data.params)
    half = theta.shape[-1]
    w = np.abs(form.concat_weight)
    bias = 0.0 if form.concat_bias is None else np.abs(form.concat_bias)
    a = (theta_error + u * np.abs(theta)) @ w[:half] + u * bias
    b = (phi_error + u * np.abs(phi)) @ w[half:]
    return a[:, :, None] + b[:, None, :]
