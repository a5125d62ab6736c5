"""First and second derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import EPSILONS, assert_close, assert_names, eps_of, largest
from nonlocal_conformance.cases import Array, Case, Data
from nonlocal_conformance.checks.values import NOT_FINITE, hidden_in, op_arrays, operation_of, with_hidden
from nonlocal_conformance.registry import check, methods_of
from nonlocal_core.reference.block import branch, statistics_of
from nonlocal_core.spec.parameters import STATISTICS

STEP = 1e-6
"""The step of the finite differences, in float64: small, or it crosses a kink of the ReLU or of the pooling."""

DIFFERENCE_EPSILONS = 2.0**26
"""The tolerance of second derivatives in float64: dividing rounding errors by the step leaves no more."""


def assert_gradients(
    actual: tuple[Any, dict[str, Any]],
    expected: tuple[Array, dict[str, Array]],
    dtype: str,
    *,
    terms: tuple[Array, dict[str, Array]],
    epsilons: float = EPSILONS,
    where: str = "",
) -> None:
    """Assert that the gradients of the input and of the parameters are the expected ones.

    Some are small or zero by cancellation (that of phi's bias before a softmax, those before batch norm), so the
    tolerance is relative to the largest gradient of the same layer, or to the largest of its `terms`.
    """
    assert_names("the gradients of the parameters", actual[1], expected[1])
    scale = largest(expected[0], terms[0])
    assert_close(f"dx{where}", actual[0], expected[0], dtype=dtype, scale=scale, epsilons=epsilons)
    for name, gradient in expected[1].items():
        scale = largest_of_layer(name, expected[1], terms[1])
        assert_close(f"d{name}{where}", actual[1][name], gradient, dtype=dtype, scale=scale, epsilons=epsilons)


def largest_of_layer(name: str, *gradients: dict[str, Array]) -> float:
    """Return the largest value among what has the layer of this name."""
    layer = name.partition(".")[0]
    return largest(*(a for one in gradients for other, a in one.items() if other.partition(".")[0] == layer))


def reference_gradients(case: Case, wide: Data) -> tuple[Any, Any]:
    """Return the reference's gradients, and the terms that batch norm in training makes cancel.

    From the gradient that it would pass on with its statistics held fixed, batch norm in training subtracts the
    mean and a multiple of its output: what is left can be far smaller.
    """
    spec, arguments = case.spec, (wide.dz, wide.key_mask)
    gradients = nlc.nonlocal_block_vjp(wide.x, wide.params, spec, *arguments, case.training)
    if not (case.training and spec.norm == "batch"):
        return gradients, gradients
    r = branch(wide.x, wide.params, spec, wide.key_mask)
    mean, variance = statistics_of(r, wide.params, case.training, wide.key_mask)
    fixed = {**wide.params, "norm.mean": mean, "norm.variance": variance}
    return gradients, nlc.nonlocal_block_vjp(wide.x, fixed, spec, *arguments)


@check("vjp", cases=lambda case: case.is_differentiable)
def gradients(driver: Any, case: Case, dtype: str) -> None:
    """The gradients of the input and of every parameter equal the reference's, by every method."""
    data, spec = case.data(dtype), case.spec
    expected, terms = reference_gradients(case, data.wide())
    for method in methods_of(driver, spec):
        actual = driver.vjp(spec, data.params, data.x, data.dz, data.key_mask, training=case.training, method=method)
        assert_gradients(actual, expected, dtype, terms=terms)


@check("vjp", cases=lambda case: case.mask is not None and case.is_differentiable)
def masked_gradients(driver: Any, case: Case, dtype: str) -> None:
    """What stands at a masked position, whatever it is, reaches no gradient of a parameter or of another position."""
    data, spec = case.data(dtype), case.spec
    zeros = dataclasses.replace(data, x=with_hidden(data.x, data), dz=with_hidden(data.dz, data))
    expected, terms = reference_gradients(case, zeros.wide())
    for what, values in hidden_in(case).items():
        x = with_hidden(data.x, data, values)
        dz = with_hidden(data.dz, data, values) if what == NOT_FINITE else zeros.dz
        for method in methods_of(driver, spec):
            actual = driver.vjp(spec, data.params, x, dz, data.key_mask, training=case.training, method=method)
            assert_gradients(actual, expected, dtype, terms=terms, where=f" beside masked positions of {what}")


@check("op_vjp", cases=lambda case: case.is_differentiable, first=operation_of, by_reference=True)
def operation_gradients(driver: Any, case: Case, dtype: str) -> None:
    """The gradients of the operation alone equal the reference's."""
    arrays, options, dy = op_arrays(case, dtype)
    wide: dict[str, Any] = {name: a.astype(np.float64) for name, a in arrays.items()}
    expected = nlc.nonlocal_op_vjp(**wide, dy=dy.astype(np.float64), **options)
    actual = driver.op_vjp(**arrays, dy=dy, **options)
    assert_names("the gradients of the operation", actual, expected)
    for name, gradient in expected.items():
        assert_close(f"d{name}", actual[name], gradient, dtype=dtype)


@check("op", "op_vjp", cases=lambda case: case.mask is not None and case.is_differentiable, first=operation_of)
def masked_keys(driver: Any, case: Case, dtype: str) -> None:
    """What stands at a masked key, however large, infinite or no number, reaches neither the sums nor a gradient."""
    arrays, options, dy = op_arrays(case, dtype)
    wide: dict[str, Any] = {name: a.astype(np.float64) for name, a in arrays.items()}
    expected = nlc.nonlocal_op(**wide, **options)
    gradients = nlc.nonlocal_op_vjp(**wide, dy=dy.astype(np.float64), **options)
    shown = options["key_mask"][..., None]
    for value in (-1e4, 1e4, np.inf, np.nan):
        hidden = {name: np.where(shown, arrays[name], np.asarray(value, dtype)) for name in ("phi", "g")}
        assert_close(f"y beside {value}", driver.op(**arrays | hidden, **options), expected, dtype=dtype)
        actual = driver.op_vjp(**arrays | hidden, dy=dy, **options)
        for name, gradient in gradients.items():
            assert_close(f"d{name} beside {value}", actual[name], gradient, dtype=dtype)


@check("hvp", cases=lambda case: case.is_differentiable and not case.ties, every_dtype=False)
def second_derivatives(driver: Any, case: Case, dtype: str) -> None:
    """The gradient of <gradients, v> equals the change of the reference's gradients along v, by every method."""
    data, spec = case.data(dtype), case.spec
    rng = np.random.default_rng(1)
    wide = data.wide()
    vx = np.asarray(rng.normal(size=data.x.shape))
    vparams = {name: np.asarray(rng.normal(size=a.shape)) for name, a in data.params.items() if name not in STATISTICS}
    directions = (vx.astype(dtype), {name: v.astype(dtype) for name, v in vparams.items()})
    expected = _directional(case, wide, vx, vparams)
    # The differences decide what float64 is held to; what a narrower dtype rounds counts as often as the data say.
    terms = expected if dtype == "float64" else _condition(case, wide, vx, vparams, expected)
    epsilons = max(EPSILONS, DIFFERENCE_EPSILONS * eps_of(np.float64) / eps_of(dtype))
    arguments, training = (spec, data.params, data.x, data.dz, *directions, data.key_mask), case.training
    for method in methods_of(driver, spec):
        actual = driver.hvp(*arguments, training=training, method=method)
        assert_gradients(actual, expected, dtype, terms=terms, epsilons=epsilons)


def _directional(case: Case, data: Data, vx: Array, vparams: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Return the derivative of the reference's gradients along v, by central differences."""

    def at(t: float) -> tuple[Array, dict[str, Array]]:
        params = {name: a + t * vparams[name] if name in vparams else a for name, a in data.params.items()}
        x = data.x + t * vx
        return nlc.nonlocal_block_vjp(x, params, case.spec, data.dz, data.key_mask, case.training)

    (dx_after, after), (dx_before, before) = at(STEP), at(-STEP)
    width = 2 * STEP
    return (dx_after - dx_before) / width, {name: (after[name] - before[name]) / width for name in vparams}


def _condition(
    case: Case, data: Data, vx: Array, vparams: dict[str, Array], expected: tuple[Array, dict[str, Array]]
) -> tuple[Array, dict[str, Array]]:
    """Return by how much the expected derivatives change, for each unit by which all given numbers do, relatively.

    Large scores make it large: rounding them moves a small weight of a softmax by as many units as the score has.
    """
    rng = np.random.default_rng(2)

    def moved(a: Array) -> Array:
        return a * (1 + STEP * rng.choice([-1.0, 1.0], a.shape))

    params = {name: moved(a) for name, a in data.params.items()}
    other = dataclasses.replace(data, x=moved(data.x), params=params, dz=moved(data.dz))
    dx, dparams = _directional(case, other, vx, vparams)
    return (dx - expected[0]) / STEP, {name: (d - expected[1][name]) / STEP for name, d in dparams.items()}
