"""The very same reference on arrays that have what the standard demands and nothing else, on a device of their own."""

import re

import array_api_strict as strict
import numpy as np
import pytest

import nonlocal_core as nlc
from nonlocal_conformance import CASES

DEVICE = strict.Device("device1")
"""Not the default one: arrays on two devices cannot be combined."""

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def there(array):
    return None if array is None else strict.asarray(array, device=DEVICE)


def here(array):
    assert array.device == DEVICE
    return np.asarray(array.to_device(strict.Device("CPU_DEVICE")))


def moved(data):
    return there(data.x), {name: there(a) for name, a in data.params.items()}, there(data.key_mask)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_the_block_and_its_weights_are_those_of_numpy(case):
    data = case.data()
    x, params, mask = moved(data)
    z, expected = (
        nlc.nonlocal_block(x, params, case.spec, mask, case.training),
        nlc.nonlocal_block(data.x, data.params, case.spec, data.key_mask, case.training),
    )
    assert z.dtype == x.dtype
    np.testing.assert_allclose(here(z), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    for positions in (None, [3 % x.shape[1]]):
        rows, expected = (
            nlc.attention(x, params, case.spec, positions, mask),
            nlc.attention(data.x, data.params, case.spec, positions, data.key_mask),
        )
        np.testing.assert_allclose(here(rows), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_statistics_are_those_of_numpy(unbiased):
    case = CASES["training_masked"]
    data = case.data()
    x, params, mask = moved(data)
    actual = nlc.updated_statistics(x, params, case.spec, mask, unbiased=unbiased)
    expected = nlc.updated_statistics(data.x, data.params, case.spec, data.key_mask, unbiased=unbiased)
    assert actual.keys() == expected.keys()
    assert all(np.allclose(here(actual[name]), expected[name], rtol=1e-13) for name in expected)


@pytest.mark.parametrize("mask", [None, np.array([[True, False, True, True], [False] * 4])], ids=["whole", "masked"])
@pytest.mark.parametrize("pairwise", FORMS)
def test_the_operation_is_that_of_numpy(pairwise, mask):
    rng = np.random.default_rng(0)
    sizes = {"theta": (2, 5, 3), "phi": (2, 4, 3), "g": (2, 4, 2)}
    if pairwise == "concatenation":
        sizes |= {"concat_weight": (6,), "concat_bias": ()}
    given = {name: np.asarray(rng.normal(size=size), np.float32) for name, size in sizes.items()}
    y = nlc.nonlocal_op(**{name: there(a) for name, a in given.items()}, pairwise=pairwise, key_mask=there(mask))
    assert y.dtype == strict.float32
    np.testing.assert_allclose(here(y), nlc.nonlocal_op(**given, pairwise=pairwise, key_mask=mask), rtol=1e-6)


@pytest.mark.parametrize("name", ["theta", "phi", "g", "dy"])
def test_the_gradients_of_the_operation_are_for_numpy_arrays(name):
    given = dict.fromkeys(("theta", "phi", "g", "dy"), np.ones((1, 2, 2)))
    given[name] = there(given[name])
    message = f"`{name}` must be a NumPy array. Got shape (1, 2, 2) of type Array."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        nlc.nonlocal_op_vjp(**given)


@pytest.mark.parametrize("name", ["x", "dz"])
def test_the_gradients_of_the_block_are_for_numpy_arrays(name):
    spec = nlc.NonLocalSpec(channels=2)
    given = {"x": np.ones((1, 3, 2)), "dz": np.ones((1, 3, 2))}
    given[name] = there(given[name])
    message = f"`{name}` must be a NumPy array. Got shape (1, 3, 2) of type Array."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        nlc.nonlocal_block_vjp(params=nlc.init_params(spec, np.random.default_rng(0)), spec=spec, **given)


def test_the_methods_without_the_matrix_are_for_numpy_arrays():
    theta = there(np.ones((1, 2, 2)))
    message = "`theta` must be a NumPy array for the method 'streamed'. Got shape (1, 2, 2) of type Array."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        nlc.nonlocal_op(theta, theta, theta, method="streamed")
    spec = nlc.NonLocalSpec(channels=2, pairwise="concatenation")
    params = {name: there(a) for name, a in nlc.init_params(spec, np.random.default_rng(0)).items()}
    message = "`x` must be a NumPy array for the method 'sorted'. Got shape (1, 2, 2) of type Array."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        nlc.nonlocal_block(theta, params, spec, method="sorted")
    assert nlc.nonlocal_block(theta, params, spec, method="pairwise").shape == theta.shape
