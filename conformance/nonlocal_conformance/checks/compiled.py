"""Compilation together with gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_names
from nonlocal_conformance.cases import Case
from nonlocal_conformance.checks.derivatives import assert_gradients, reference_gradients
from nonlocal_conformance.checks.values import assert_output, form
from nonlocal_conformance.registry import check, methods_of

_of_each_form: dict[str, Any] = {
    "cases": lambda case: (
        case.is_differentiable
        and case.spec.has_embedding
        and case.spec.norm == "batch"
        and case.is_pooled
        and case.mask == "some"
    ),
    "first": form,
    "every_dtype": False,
}


@check("compiled_vjp", **_of_each_form)
def compiled_training(driver: Any, case: Case, dtype: str) -> None:
    """The block compiled for training gives the reference's output, statistics and gradients, beside a mask."""
    case = dataclasses.replace(case, training=True)
    data, spec, method = case.data(dtype), case.spec, methods_of(driver, case.spec)[-1]
    wide = data.wide()
    arguments = (spec, data.params, data.x, data.dz, data.key_mask)
    z, statistics, dx, dparams = driver.compiled_vjp(*arguments, training=True, method=method)
    where = f" of the block compiled with method {method!r}"
    assert_output(f"z{where}", z, case, data, dtype)
    moved = nlc.updated_statistics(wide.x, wide.params, spec, wide.key_mask, unbiased=driver.unbiased)
    assert_names(f"the running statistics{where}", statistics, moved)
    for name, value in moved.items():
        assert_close(f"{name}{where}", statistics[name], value, dtype=dtype)
    expected, terms = reference_gradients(case, wide)
    assert_gradients((dx, dparams), expected, dtype, terms=terms, where=where)
