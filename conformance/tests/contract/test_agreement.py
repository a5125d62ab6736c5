"""All installed backends together: weights travel between them, and random cases find them agreed."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings

import nonlocal_core as nlc
from nonlocal_conformance import CASES, CHECKS, loader
from nonlocal_conformance.assertions import assert_same, largest
from nonlocal_conformance.checks import derivatives, values
from nonlocal_conformance.checks.methods import memory
from nonlocal_conformance.registry import bind
from nonlocal_conformance.strategies import cases

DRIVERS = loader.available()[0]
FRAMEWORKS = [driver for driver in DRIVERS if driver.name != "numpy"]  # whose definition goes by chunks of queries
TRAVELLED = ("gaussian_batch_norm", "embedded_gaussian_groups", "concat_bias", "affine", "some_bias")


def in_memory(params, spec, _):
    return params, spec


def through_a_file(params, spec, folder):
    nlc.save_params(folder / "block.safetensors", params, spec)
    return nlc.load_params(folder / "block.safetensors")


@pytest.mark.parametrize("carry", [in_memory, through_a_file])
@pytest.mark.parametrize("name", TRAVELLED)
def test_weights_go_round_all_backends_and_give_the_same_output_in_each(name, carry, tmp_path):
    case = CASES[name]
    data = case.data("float32")
    params, spec = data.params, case.spec
    for driver in DRIVERS:
        params, spec = carry(driver.export(spec, params), spec, tmp_path)
        z, _ = driver.block(spec, params, data.x)
        values.assert_output(f"z in {driver.name}", z, case, data, "float32")
    assert spec == case.spec
    for parameter, array in data.params.items():
        assert_same(parameter, params[parameter], array)


@pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.name)
@settings(max_examples=40, derandomize=True)
@given(case=cases())
def test_a_random_block_computes_what_the_reference_computes(driver, case):
    data, dtype = case.data(), "float64"
    values.forward(driver, case, dtype)
    expected, _ = derivatives.reference_gradients(case, data)
    # With a few random keys the gradients of one layer can cancel: the tolerance is relative to those of all.
    whole = np.asarray(largest(expected[0], *expected[1].values()))
    terms = (whole, dict.fromkeys(expected[1], whole))
    actual = driver.vjp(case.spec, data.params, data.x, data.dz, data.key_mask)
    derivatives.assert_gradients(actual, expected, dtype, terms=terms)


@pytest.mark.parametrize("driver", DRIVERS, ids=lambda driver: driver.name)
def test_every_declared_capability_is_exercised(driver):
    bound = bind(driver)
    exercised = {need for one in bound for need in one.check.needs}
    if driver.name == "numpy":  # what only a comparison with the reference needs, others are compared with
        exercised |= {need for check in CHECKS.values() if check.by_reference for need in check.needs}
    exercised |= {"functions" for one in bound if not one.case.is_differentiable}
    assert driver.capabilities - {"uneven"} <= exercised
    assert ("uneven" in driver.capabilities) == any(one.case.is_uneven for one in bound)
    assert {one.dtype for one in bound} == set(driver.dtypes)


class Matrix:
    """A driver that takes the matrix of weights, whatever it is asked for."""

    def __init__(self, driver, call):
        self.driver, self.call = driver, call

    def __getattr__(self, name):
        found = getattr(self.driver, name)
        return partial(found, method="pairwise") if name == self.call else found


@pytest.mark.parametrize(("call", "what"), [("block", "output"), ("vjp", "gradients")])
@pytest.mark.parametrize("driver", FRAMEWORKS, ids=lambda driver: driver.name)
def test_a_matrix_of_weights_is_seen_by_the_check_of_the_memory(driver, call, what):
    with pytest.raises(AssertionError, match=rf"the {what} needed \d+ MiB, the matrix has 49"):
        memory(Matrix(driver, call), CASES["dot_product_1d"], "float32")
