"""The very same reference on arrays of frameworks; `test_array_api_strict.py` has those of the standard alone."""

import jax
import numpy as np
import pytest
import torch

import nonlocal_core as nlc
from nonlocal_conformance import CASES

ARRAYS = {"torch": torch.asarray, "jax": jax.numpy.asarray}
LIBRARIES = ["torch"]
"""Those on which every case runs; JAX compiles each step of each, so it has some of them."""


def moved(make, data):
    params = {name: make(a) for name, a in data.params.items()}
    return make(data.x), params, None if data.key_mask is None else make(data.key_mask)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_the_block_and_its_weights_are_the_same_on_other_arrays(library, case):
    data, make = case.data(), ARRAYS[library]
    x, params, mask = moved(make, data)
    z, expected = (
        nlc.nonlocal_block(x, params, case.spec, mask, case.training),
        nlc.nonlocal_block(data.x, data.params, case.spec, data.key_mask, case.training),
    )
    assert type(z) is type(x)
    assert z.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(z), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    rows, expected = (
        nlc.attention(x, params, case.spec, [3 % x.shape[1]], mask),
        nlc.attention(data.x, data.params, case.spec, [3 % x.shape[1]], data.key_mask),
    )
    np.testing.assert_allclose(np.asarray(rows), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_statistics_are_the_same_on_other_arrays(library):
    case = CASES["training_masked"]
    data, make = case.data(), ARRAYS[library]
    x, params, mask = moved(make, data)
    actual = nlc.updated_statistics(x, params, case.spec, mask, unbiased=True)
    expected = nlc.updated_statistics(data.x, data.params, case.spec, data.key_mask, unbiased=True)
    assert actual.keys() == expected.keys()
    assert all(np.allclose(np.asarray(actual[name]), expected[name], rtol=1e-13) for name in expected)


def test_a_function_of_ones_own_gets_the_arrays_of_the_library():
    case = CASES["function_softmax"]
    data = case.data()
    x, params, _ = moved(torch.asarray, data)
    expected = nlc.nonlocal_block(data.x, data.params, case.spec)
    np.testing.assert_allclose(nlc.nonlocal_block(x, params, case.spec).numpy(), expected, rtol=1e-12)


def test_torch_differentiates_the_reference_as_the_gradients_say():
    case = CASES["concatenation_groups"]
    data = case.data()
    x, params, _ = moved(lambda a: torch.asarray(a).requires_grad_(), data)
    nlc.nonlocal_block(x, params, case.spec).backward(torch.asarray(data.dz))
    dx, dparams = nlc.nonlocal_block_vjp(data.x, data.params, case.spec, data.dz)
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=0, atol=1e-13 * np.abs(dx).max())
    assert all(np.allclose(params[name].grad.numpy(), d, atol=1e-12 * np.abs(d).max()) for name, d in dparams.items())


@pytest.mark.parametrize(
    "name", ["gaussian_ties", "concatenation_masked_projection", "dot_product_training", "concatenation_groups"]
)
def test_the_block_and_its_weights_are_the_same_on_jax_arrays_in_float64(name):
    with jax.enable_x64(True):  # noqa: FBT003 - its only argument
        test_the_block_and_its_weights_are_the_same_on_other_arrays("jax", CASES[name])


def test_a_library_without_float64_computes_in_its_widest_dtype():
    case = CASES["concatenation_masked_projection"]
    data = case.data("float32")
    x, params, mask = moved(jax.numpy.asarray, data)
    z = nlc.nonlocal_block(x, params, case.spec, mask)
    expected = nlc.nonlocal_block(data.x, data.params, case.spec, data.key_mask)
    assert z.dtype == np.float32
    np.testing.assert_allclose(np.asarray(z), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert nlc.attention(x, params, case.spec, [3], mask).shape == (3, 1, 4)


def test_arrays_of_two_libraries_in_one_call_are_refused():
    theta, phi, g = np.ones((1, 2, 3)), torch.ones(1, 4, 3), np.ones((1, 4, 3))
    with pytest.raises(TypeError, match="`phi` must be an array of the same library as `theta`"):
        nlc.nonlocal_op(theta, phi, g)
