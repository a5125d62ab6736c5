"""The exact methods in NumPy: the same numbers as the matrix, without it."""

import numpy as np
import pytest
import torch

import nonlocal_core as nlc
from nonlocal_conformance.memory import peak_resident
from nonlocal_core.planning import exact_method, serves
from nonlocal_core.reference import exact

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def arguments(pairwise, queries, keys, width=4, values=3, batch=2):
    rng = np.random.default_rng(0)
    sizes = {"theta": (batch, queries, width), "phi": (batch, keys, width), "g": (batch, keys, values)}
    given = {name: rng.normal(size=size) for name, size in sizes.items()}
    if pairwise == "concatenation":
        given |= {"concat_weight": rng.normal(size=2 * width), "concat_bias": np.asarray(0.3)}
    return given, {"pairwise": pairwise, "scale": -0.7, "method": exact_method(pairwise)}


@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize(
    ("queries", "keys", "batch"),
    [(13, 9, 2), (9, 13, 2), (1, 5, 2), (5, 1, 2), (1300, 1100, 2), (40, 2, 2), (0, 3, 2), (3, 4, 0), (4, 3, 0)],
)
def test_a_method_gives_the_sums_and_the_gradients_of_the_definition(pairwise, queries, keys, batch):
    given, options = arguments(pairwise, queries, keys, batch=batch)
    dy = np.random.default_rng(1).normal(size=(batch, queries, 3))
    plain = {**options, "method": "pairwise"}
    np.testing.assert_allclose(nlc.nonlocal_op(**given, **options), nlc.nonlocal_op(**given, **plain), atol=1e-12)
    expected = nlc.nonlocal_op_vjp(**given, dy=dy, **plain)
    actual = nlc.nonlocal_op_vjp(**given, dy=dy, **options)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(actual[name], gradient, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("pairwise", FORMS)
def test_a_method_passes_over_masked_keys_block_by_block(pairwise):
    given, options = arguments(pairwise, 700, 1100, batch=3)
    mask = np.random.default_rng(2).random((3, 1100)) < 0.5
    mask[0, : exact.CHUNK] = False  # the first chunk of keys has none
    mask[2] = False
    plain = {**options, "method": "pairwise"}
    y = nlc.nonlocal_op(**given, **options, key_mask=mask)
    np.testing.assert_allclose(y, nlc.nonlocal_op(**given, **plain, key_mask=mask), atol=1e-12)
    assert not y[2].any()


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product", "concatenation"])
def test_65536_keys_give_the_rows_of_the_definition_without_the_memory_of_the_matrix(pairwise):
    queries = 64 if pairwise == "embedded_gaussian" else 65536
    given, options = arguments(pairwise, queries, 65536, width=8, batch=1)
    y, peak = peak_resident(lambda: nlc.nonlocal_op(**given, **options))
    rows = np.arange(0, queries, max(1, queries // 16))
    chosen = {**given, "theta": given["theta"][:, rows]}
    np.testing.assert_allclose(y[:, rows], nlc.nonlocal_op(**chosen, **{**options, "method": "pairwise"}), atol=1e-11)
    assert peak is None or peak < 2**28


def test_opposite_offsets_lose_no_digits_of_the_sorted_sums():
    given, options = arguments("concatenation", 50, 60)
    moved = {**given, "theta": given["theta"] + 1e6, "phi": given["phi"] - 1e6}
    moved["concat_weight"] = np.array([1.0, 0, 0, 0] * 2)
    plain = {**moved, "theta": moved["theta"] - 1e6, "phi": moved["phi"] + 1e6}
    np.testing.assert_allclose(nlc.nonlocal_op(**moved, **options), nlc.nonlocal_op(**plain, **options), atol=1e-9)


def test_the_sums_over_active_keys_are_their_own_transpose():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 11)), rng.normal(size=(2, 7))
    values, cotangents = rng.normal(size=(2, 7, 3)), rng.normal(size=(2, 11, 3))
    left = np.sum(exact.active_sums(a, b, values) * cotangents)
    assert left == pytest.approx(np.sum(values * exact.active_sums(b, a, cotangents)))


@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize("method", ["streamed", "reassociated", "sorted"])
def test_a_method_is_refused_by_name_for_a_form_that_it_does_not_serve(pairwise, method):
    given, options = arguments(pairwise, 3, 4)
    if serves(method, pairwise):
        assert nlc.nonlocal_op(**given, **{**options, "method": method}).shape == (2, 3, 3)
        return
    rule = (
        f"`method` must be 'auto', 'pairwise' or '{exact_method(pairwise)}' for the form '{pairwise}'. Got '{method}'"
    )
    with pytest.raises(ValueError, match=rule):
        nlc.nonlocal_op(**given, **{**options, "method": method})


def test_a_function_has_the_matrix_alone():
    given, _ = arguments("dot_product", 3, 4)
    with pytest.raises(ValueError, match=r"`method` must be 'auto' or 'pairwise' for a function. Got 'streamed'"):
        nlc.nonlocal_op(**given, pairwise=lambda a, b: a @ b.mT, normalize="softmax", method="streamed")


def test_the_methods_of_the_core_are_for_numpy_arrays():
    given, options = arguments("dot_product", 3, 4)
    tensors = {name: torch.as_tensor(a) for name, a in given.items()}
    with pytest.raises(TypeError, match="`theta` must be a NumPy array for the method 'reassociated'"):
        nlc.nonlocal_op(**tensors, **options)
    spec = nlc.NonLocalSpec(channels=4)
    with pytest.raises(TypeError, match="`x` must be a NumPy array for the method 'streamed'"):
        nlc.nonlocal_block(
            torch.ones(1, 3, 4), nlc.init_params(spec, np.random.default_rng(0)), spec, method="streamed"
        )
