"""How a block starts, and that its parameters come out as they went in."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from nonlocal_conformance.assertions import assert_names, assert_same, require
from nonlocal_conformance.cases import Case
from nonlocal_conformance.registry import check
from nonlocal_core import NonLocalSpec, param_shapes
from nonlocal_core.spec.parameters import initial_moments

DEVIATIONS = 6.0
"""How many standard errors an estimate may be off."""


@check("initial", cases=lambda case: case.spec.residual and case.spec.zero_init)
def identity_at_start(driver: Any, case: Case, dtype: str) -> None:
    """A new residual block returns its input, bit for bit, in evaluation and in training."""
    data = case.data(dtype)
    params = {name: a.astype(dtype) for name, a in driver.initial(case.spec).items()}
    for training in {False, case.training}:
        z, _ = driver.block(case.spec, params, data.x, data.key_mask, training=training)
        assert_same("z of a new block", z, data.x)


def _parameters(case: Case) -> tuple[Any, ...]:
    """Return the names and shapes of the parameters of a case."""
    return tuple(param_shapes(case.spec).items())


@check("initial", first=lambda case: (case.spec.pairwise == "concatenation", case.spec.norm), every_dtype=False)
def start(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - a start has its own dtype
    """New weights are normal, mean 0, standard deviation 0.01, each of its own; what is fixed has its value exactly."""
    for zero_init in (True, False):
        options = {**case.options, "channels": 96, "inner_channels": 80, "zero_init": zero_init}
        spec = NonLocalSpec(**options)
        params = driver.initial(spec)
        assert_names("the parameters", params, param_shapes(spec))
        for name, shape in param_shapes(spec).items():
            mean, deviation = initial_moments(name, spec)
            if deviation == 0:
                assert_same(f"{name} of a new block", params[name], np.full(shape, mean, params[name].dtype))
                continue
            size = params[name].size
            require(params[name].shape == shape, f"{name} must have shape {shape}")
            off = abs(float(params[name].mean()) - mean) / (deviation / size**0.5)
            require(off < DEVIATIONS, f"the mean of new {name} is {off:.1f} standard errors from {mean}")
            off = abs(float(params[name].std()) - deviation) / (deviation / (2 * size) ** 0.5)
            require(off < DEVIATIONS, f"the deviation of new {name} is {off:.1f} standard errors from {deviation}")
            fourth = float(np.mean(((params[name] - mean) / deviation) ** 4))
            off = abs(fourth / float(params[name].std() / deviation) ** 4 - 3) / (24 / size) ** 0.5
            require(off < DEVIATIONS, f"the kurtosis of new {name} is {off:.1f} standard errors from 3, the normal one")
        drawn = [name for name in ("theta.weight", "phi.weight", "g.weight") if name in params]
        for one, other in itertools.combinations(drawn, 2):
            require(not np.array_equal(params[one], params[other]), f"new {one} and {other} must not be equal")
        again, another = driver.initial(spec, seed=0), driver.initial(spec, seed=1)
        for name in drawn:
            assert_same(f"{name} of a new block from the same seed", again[name], params[name])
            require(not np.array_equal(another[name], params[name]), f"new {name} must follow the seed")


@check("rebuilt", cases=lambda case: case.is_differentiable, every_dtype=False)
def rebuilt(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - a description has no dtype
    """A block made anew from the description that it gives of itself, a config or a pickle, has the same spec."""
    spec = driver.rebuilt(case.spec)
    require(spec == case.spec, f"the rebuilt block must have the spec {case.spec}, and has {spec}")


@check("export", first=_parameters)
def export(driver: Any, case: Case, dtype: str) -> None:
    """Parameters that a block takes in come out, as copies, with the same names, shapes, dtype and bits."""
    data = case.data(dtype)
    params = driver.export(case.spec, data.params)
    assert_names("the exported parameters", params, data.params)
    for name, array in data.params.items():
        assert_same(f"{name} as exported", params[name], array)
        require(not np.shares_memory(params[name], array), f"{name} as exported must be a copy")
