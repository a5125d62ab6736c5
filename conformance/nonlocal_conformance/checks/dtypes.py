"""Dtypes that meet: of the input, of the parameters and of the operands, in the output, gradients and statistics."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import EPSILONS, assert_close, assert_names, assert_within, eps_of, largest
from nonlocal_conformance.bounds import UNITS, attention_bound
from nonlocal_conformance.case import Array, Case, Data, dtype_named
from nonlocal_conformance.checks.derivatives import largest_of_layer, reference_gradients
from nonlocal_conformance.checks.values import form
from nonlocal_conformance.registry import check, methods_of

_of_each_form: dict[str, Any] = {
    "cases": lambda case: (
        case.is_differentiable and case.spec.norm == "batch" and not case.is_pooled and case.mask is None
    ),
    "first": form,
    "every_dtype": False,
}
"""Without pooling, where the least change makes another position the largest, and moves its gradient there."""

_masked_of_each_form: dict[str, Any] = {
    "cases": lambda case: case.is_differentiable and case.mask == "some" and case.is_pooled and not case.training,
    "first": form,
    "every_dtype": False,
}

ROUNDINGS = 4.0
"""How many roundings in one direction those of a call amount to. There are eight at most, one after the other: of an
argument, a projection, the weights, y and the last layer's result on the way to z, and of the gradients of three of
these on the way back. Their directions are independent: together they do what the root of eight does, less than 4."""

DRAWS = 4
"""How often the arguments are changed at random."""


def _variants(case: Case) -> list[Case]:
    """Return a case in evaluation, with a mask, and in training, without."""
    return [dataclasses.replace(case, mask="some", training=False), dataclasses.replace(case, mask=None, training=True)]


def _reference(driver: Any, case: Case, data: Data) -> dict[str, Array]:
    """Return all that the reference computes: z, the statistics and the gradients, by their names."""
    arguments = (data.x, data.params, case.spec)
    found = {"z": nlc.nonlocal_block(*arguments, data.key_mask, case.training)}
    if case.training:
        found |= nlc.updated_statistics(*arguments, data.key_mask, unbiased=driver.unbiased)
    dx, dparams = nlc.nonlocal_block_vjp(*arguments, data.dz, data.key_mask, case.training)
    return found | {"dx": dx} | {f"d{name}": d for name, d in dparams.items()}


def _named(everything: tuple[Array, dict[str, Array], Array, dict[str, Array]], case: Case) -> dict[str, Array]:
    """Return what a driver gives, by the names of `_reference`."""
    z, statistics, dx, dparams = everything
    return {"z": z, "dx": dx} | (statistics if case.training else {}) | {f"d{name}": d for name, d in dparams.items()}


def _allowed(driver: Any, case: Case, wide: Data, expected: dict[str, Array], dtype: str) -> dict[str, float]:
    """Return how far each result may be from the reference if operands are rounded to `dtype`.

    Rounding x, dz and the parameters moves each value by at most one unit. What that does to the result is measured
    on the reference: each value is moved by the whole unit, up or down at random, and the largest change of
    several draws is that of one rounding. Every rounding further on moves a result less or as much, since it is one
    of the same relative size in the middle of the way; there are `ROUNDINGS` of them.
    """
    rng, unit = np.random.default_rng(0), UNITS[dtype]

    def moved(a: Array) -> Array:
        return a * (1 + unit * rng.choice([-1.0, 1.0], a.shape))

    changes = []
    for _ in range(DRAWS):
        params = {name: moved(a) for name, a in wide.params.items()}
        found = _reference(driver, case, dataclasses.replace(wide, x=moved(wide.x), dz=moved(wide.dz), params=params))
        changes.append({name: found[name] - a for name, a in expected.items()})
    return {name: ROUNDINGS * max(largest_of_layer(name, change) for change in changes) for name in expected}


def _assert_rounded(
    where: str, actual: dict[str, Array], expected: dict[str, Array], allowed: dict[str, float], kinds: dict[str, Any]
) -> None:
    """Assert dtypes, and that no result is further from the reference than is allowed."""
    assert_names(f"the results {where}", actual, expected)
    for name, array in expected.items():
        kind = kinds.get(name, kinds["others"])
        epsilons = allowed[name] / eps_of(kind)
        assert_close(f"{name} {where}", actual[name], array, dtype=kind, scale=1.0, epsilons=epsilons)


@check("mixed_vjp", **_of_each_form)
def mixed_gradients(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """With half-precision operands, training and all gradients are float32 and off by what rounding can do."""
    for variant in _variants(case):
        data = variant.data("float32")
        wide, spec = data.wide(), case.spec
        expected = _reference(driver, variant, wide)
        for compute in driver.mixed_dtypes:
            allowed = _allowed(driver, variant, wide, expected, compute)
            for method in methods_of(driver, spec):
                everything = driver.mixed_vjp(
                    spec, data.params, data.x, data.dz, compute, data.key_mask, training=variant.training, method=method
                )
                where = f"in {compute} by method {method!r}, training={variant.training}"
                _assert_rounded(where, _named(everything, variant), expected, allowed, {"others": np.float32})


@check("mixed_attention", **_masked_of_each_form)
def mixed_attention(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """With half-precision operands, the rows of the weights are float32 and off by no more than their bound."""
    data = case.data("float32")
    wide = data.wide()
    expected = nlc.attention(wide.x, wide.params, case.spec, key_mask=wide.key_mask)
    for compute in driver.mixed_dtypes:
        rows = driver.mixed_attention(case.spec, data.params, data.x, compute, data.key_mask)
        assert_within(f"attention in {compute}", rows, expected, attention_bound(case, wide, compute))


@check("casts", "vjp", "attention", **_of_each_form)
def input_of_another_dtype(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """Results have the dtype of x, gradients that of their array, and the digits of the coarser of both."""
    halves = [name for name in getattr(driver, "mixed_dtypes", ()) if name != "tensorfloat32"]  # which no array has
    evaluation, training_case = _variants(case)
    narrowest = min(driver.dtypes, key=lambda name: np.dtype(name).itemsize)
    runs = list(itertools.product((evaluation, training_case), itertools.permutations(driver.dtypes, 2)))
    runs += itertools.product((evaluation,), itertools.product(halves, (narrowest,)))
    for variant, (of_x, of_params) in runs:
        data = variant.data(of_params)
        kind, others = dtype_named(of_x), np.dtype(of_params)
        data = dataclasses.replace(data, x=data.x.astype(kind), dz=data.dz.astype(kind))
        wide, spec, training = data.wide(), case.spec, variant.training
        expected = _reference(driver, variant, wide)
        z, statistics = driver.block(spec, data.params, data.x, data.key_mask, training=training)
        dx, dparams = driver.vjp(spec, data.params, data.x, data.dz, data.key_mask, training=training)
        if of_x in halves:
            allowed = _allowed(driver, variant, wide, expected, of_x)
        else:
            unit = EPSILONS * max(eps_of(of_x), eps_of(of_params))
            _, (_, terms) = reference_gradients(variant, wide)
            scales = expected | {f"d{name}.terms": a for name, a in terms.items()}
            allowed = {name: unit * largest_of_layer(name, scales) for name in expected}
        where = f"of an input in {of_x} with parameters in {of_params}, training={training}"
        actual = _named((z, statistics, dx, dparams), variant)
        _assert_rounded(where, actual, expected, allowed, {"z": kind, "dx": kind, "others": others})
        if not training:
            rows = driver.attention(spec, data.params, data.x, key_mask=data.key_mask)
            weights = nlc.attention(wide.x, wide.params, spec, key_mask=wide.key_mask)
            bound: Any = EPSILONS * max(eps_of(of_x), eps_of(of_params)) * largest(weights)
            if of_x in halves:  # the weights are rounded once more where they are given out
                bound = attention_bound(variant, wide, of_x) + UNITS[of_x] * np.abs(weights)
            assert_within(f"attention {where}", rows, weights, bound, dtype=kind)
