"""That training goes where the reference's own gradients lead."""

from __future__ import annotations

from typing import Any

import numpy as np

from nonlocal_conformance.assertions import assert_close, assert_names
from nonlocal_conformance.cases import Case
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_conformance.registry import check

STEPS, RATE = 20, 0.002


@check(
    "train",
    cases=lambda case: case.is_differentiable and case.mask != "all",
    first=lambda case: (case.spec.pairwise, case.mask, case.spec.norm == "batch"),
    every_dtype=False,
    by_reference=True,
)
def trajectory(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - training is compared in float32
    """Twenty steps of plain SGD in float32 end at the losses and weights of the reference in float64."""
    data, spec = case.data("float32"), case.spec
    wide = data.wide()
    losses, params = driver.train(spec, data.params, data.x, data.dz, data.key_mask, steps=STEPS, rate=RATE)
    expected_losses, expected = NumpyDriver(unbiased=driver.unbiased).train(
        spec, wide.params, wide.x, wide.dz, wide.key_mask, steps=STEPS, rate=RATE
    )
    losses = np.asarray(losses, "float32")
    assert_close("the losses", losses, np.asarray(expected_losses), dtype="float32")
    assert_names("the trained parameters", params, expected)
    for name, value in expected.items():
        assert_close(f"{name} after training", params[name], value, dtype="float32")
