"""The running statistics of batch normalisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_names, assert_same
from nonlocal_conformance.cases import Case
from nonlocal_conformance.checks.values import assert_output, form
from nonlocal_conformance.registry import check


@check(cases=lambda case: case.spec.norm == "batch", by_reference=True)
def statistics(driver: Any, case: Case, dtype: str) -> None:
    """A call in training moves the running statistics by the momentum; in evaluation, or all masked, it leaves them."""
    data = case.data(dtype)
    wide = data.wide()
    _, after = driver.block(case.spec, data.params, data.x, data.key_mask, training=True)
    expected = nlc.updated_statistics(wide.x, wide.params, case.spec, wide.key_mask, unbiased=driver.unbiased)
    assert_names("the running statistics", after, expected)
    for name, value in expected.items():
        assert_close(f"{name} after a step", after[name], value, dtype=dtype)
        if case.mask == "all":
            assert_same(f"{name} after a step without any position", after[name], data.params[name])
    _, after = driver.block(case.spec, data.params, data.x, data.key_mask)
    for name in expected:
        assert_same(f"{name} after evaluation", after[name], data.params[name])


@check(
    cases=lambda case: case.trains_norm and case.mask is None and case.spec.bias["out"],
    first=form,
    by_reference=True,
)
def statistics_far_from_zero(driver: Any, case: Case, dtype: str) -> None:
    """A mean far larger than the deviation costs no more digits than it must: the variance is no difference."""
    data = case.data(dtype)
    params = {**data.params, "out.bias": data.params["out.bias"] + np.asarray(1e4, dtype)}
    data = dataclasses.replace(data, params=params)
    z, _ = driver.block(case.spec, params, data.x, training=True)
    assert_output("z far from zero", z, case, data, dtype)


@check("steps", cases=lambda case: case.spec.norm == "batch" and case.mask is None, by_reference=True)
def statistics_over_steps(driver: Any, case: Case, dtype: str) -> None:
    """Several steps of one block on different inputs move the running statistics as the reference does."""
    data = case.data(dtype)
    inputs = [data.x * np.asarray(factor, dtype) for factor in (1.0, 0.5, -1.5)]
    results = driver.steps(case.spec, data.params, inputs, training=True)
    params, training = data.wide().params, dataclasses.replace(case, training=True)
    for step, (x, (z, after)) in enumerate(zip(inputs, results, strict=True)):
        assert_output(f"z of step {step}", z, training, dataclasses.replace(data, x=x, params=params), dtype)
        new = nlc.updated_statistics(x.astype(np.float64), params, case.spec, unbiased=driver.unbiased)
        for name, value in new.items():
            assert_close(f"{name} after step {step}", after[name], value, dtype=dtype)
        params = {**params, **new}
