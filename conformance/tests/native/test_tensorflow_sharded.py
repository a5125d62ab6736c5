"""Blocks whose positions are cut over replicas, against the reference on the whole input."""

import re

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_sharded as work

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, largest
from nonlocal_conformance.cases import Case
from nonlocal_conformance.drivers.tensorflow import TensorflowDriver
from nonlocal_conformance.sharded.tensorflow import block_of, differentiated, processes, sharded, sharded_hvp
from nonlocal_tensorflow import NonLocalBlock

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
EVEN, VOLUME = (8, 5), (8, 4, 3)
AT_INPUT = {"subsample": 2, "subsample_at": "input"}

CUTS = {
    "samples": ({}, EVEN, 0, 2),
    "four": ({}, EVEN, 1, 4),
    "the last axis": ({}, (5, 8), 2, 2),
    "pooled": ({"subsample": 2}, EVEN, 1, 4),
    "pooled in the input": (AT_INPUT, EVEN, 1, 2),
    "within space": ({"axes": "space"}, VOLUME, 2, 4),
    "between frames": ({"axes": "space", **AT_INPUT}, VOLUME, 1, 4),
    "within time": ({"axes": "time", "subsample": (2, 1, 1)}, VOLUME, 1, 2),
    "between groups": ({"group_size": 2, "subsample": (1, 2, 1)}, VOLUME, 1, 4),
    "within groups": ({"group_size": 4}, VOLUME, 2, 2),
}
"""Options, spatial sizes, the axis of the input that is cut, and how many devices cut it."""


def case(pairwise, options, spatial, *, masked=False, dtype="float64"):
    """Return a spec with a norm, and parameters, an input, its gradient and a mask on which an error shows."""
    every = {"pairwise": pairwise, "norm": "batch", "residual": False, "zero_init": False, **options}
    made = Case("cut", every, spatial, batch=4, mask="some" if masked else None)
    data = made.data(dtype)
    return made.spec, data.params, data.x, data.dz, data.key_mask


def _wide(a):
    return {name: _wide(value) for name, value in a.items()} if isinstance(a, dict) else a.astype("float64")


def assert_as_whole(found, spec, params, x, dz, mask):
    """Compare z, the statistics and the gradients with those of the reference."""
    z, statistics, dx, dparams = found
    dtype, params, x, dz = x.dtype, _wide(params), _wide(x), _wide(dz)
    assert_close("z", z, nlc.nonlocal_block(x, params, spec, mask, training=True), dtype=dtype)
    for name, a in nlc.updated_statistics(x, params, spec, mask).items():
        assert_close(name, statistics[name], a, dtype=dtype)
    expected_dx, expected = nlc.nonlocal_block_vjp(x, params, spec, dz, mask, training=True)
    assert_close("dx", dx, expected_dx, dtype=dtype)
    scale = largest(*expected.values())
    assert dparams.keys() == expected.keys()
    for name, a in dparams.items():
        assert_close(f"d{name}", a, expected[name], dtype=dtype, scale=scale)


def covering():
    """Return forms, cuts, masks and dtypes: each form, and each cut, with every mask and dtype."""
    dtypes = ("float64", "float32")
    return [
        pytest.param(form, *cut, (i + j) % 2 > 0, dtypes[(i // 2 + j // 2) % 2], id=f"{form}, {name}")
        for i, form in enumerate(FORMS)
        for j, (name, cut) in enumerate(CUTS.items())
    ]


@pytest.mark.parametrize(("pairwise", "options", "spatial", "axis", "devices", "masked", "dtype"), covering())
def test_a_cut_input_gives_what_the_whole_gives(pairwise, options, spatial, axis, devices, masked, dtype):
    given = case(pairwise, options, spatial, masked=masked, dtype=dtype)
    assert_as_whole(sharded(*given, axis=axis, devices=devices, training=True), *given)


@pytest.mark.parametrize("method", ["pairwise", "auto"])
def test_where_keys_are_few_they_are_sent_rather_than_their_products(method):
    given = case("dot_product", {"subsample": 4}, (16,), masked=method == "auto")
    assert_as_whole(sharded(*given, axis=1, devices=4, training=True, method=method), *given)


def test_statistics_may_be_of_one_value_from_each_device():
    given = case("dot_product", {}, (1,))
    assert_as_whole(sharded(*given, axis=0, devices=4, training=True), *given)


def test_without_training_the_running_statistics_serve_and_stay():
    spec, params, x, dz, mask = case("embedded_gaussian", {}, EVEN, masked=True)
    z, statistics, *_ = sharded(spec, params, x, dz, mask, axis=1, devices=2)
    assert_close("z", z, nlc.nonlocal_block(x, params, spec, mask), dtype="float64")
    assert all((statistics[name] == params[name]).all() for name in statistics)


@pytest.mark.parametrize("pairwise", FORMS)
def test_second_derivatives_are_those_of_the_whole(pairwise):
    spec, params, x, dz, mask = case(pairwise, {"subsample": 2}, EVEN, masked=True)
    found_x, found = sharded_hvp(spec, params, x, dz, x, params, mask, axis=1, devices=4, training=True)
    expected_x, expected = TensorflowDriver().hvp(spec, params, x, dz, x, params, mask, training=True)
    scale = largest(expected_x, *expected.values())
    assert_close("the input's", found_x, expected_x, dtype="float64", scale=scale)
    for name, a in expected.items():
        assert_close(name, found[name], a, dtype="float64", scale=scale)


@pytest.mark.parametrize("pairwise", ["dot_product", "concatenation"])
def test_a_traced_function_takes_pieces_of_unknown_sizes(pairwise):
    given = case(pairwise, {"subsample": 2}, EVEN, masked=True)
    assert_as_whole(*processes(2)(work.traced, 2, *given), *given)


ERRORS = {
    "window": r"`x` must be cut between windows of `subsample`, 2 here, one for each device. Got 6 .* of \[3, 3\]",
    "small window": r"`x` must be cut between windows of `subsample`, 8 here, .* in pieces of \[3, 3\]",
    "window of a new block": r"`x` must be cut between windows of `subsample`, 2 here, .* in pieces of \[3, 3\]",
    "groups": r"`x` must be cut between groups of `group_size=2` frames. Got 6 .* along spatial axis 0 .* \[3, 3\]",
    "groups of a new block": r"`x` must be cut between groups of `group_size=2` frames",
    "axis": r"`sharded_axis` must be one of the 1 spatial axes of `x`. Got 1",
    "another norm": r"`norm` must be the block's own, whose statistics are those of all devices",
    "attention": r"`x` must be whole, and so `key_mask`, for rows of weights",
    "when run": r"`x` must be cut between windows of `subsample`",
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_cut_that_cannot_be_is_an_error(name):
    (found,) = processes(2)(work.raised, name)
    assert re.search(ERRORS[name], found)


@pytest.mark.parametrize(
    ("sharded_axis", "error", "words"),
    [
        (-1, ValueError, r"`sharded_axis` must be an int of at least 0. Got -1"),
        (1.0, TypeError, r"`sharded_axis` must be an int of at least 0. Got 1.0 of type float"),
        (True, TypeError, r"`sharded_axis` must be an int of at least 0. Got True of type bool"),
    ],
)
def test_the_axis_is_a_number(sharded_axis, error, words):
    with pytest.raises(error, match=words):
        NonLocalBlock(6, sharded_axis=sharded_axis)


def test_the_axis_is_kept():
    block = NonLocalBlock(6, norm="batch", sharded_axis=1)
    again = NonLocalBlock.from_config(block.get_config())
    assert (again.sharded_axis, again.synchronized, again.norm.synchronized) == (1, False, True)
    assert block.fold_norm().sharded_axis == 1
    assert NonLocalBlock.from_spec(block.spec, sharded_axis=1).sharded_axis == 1


def test_one_device_computes_as_without_the_axis():
    spec, params, x, dz, _ = case("dot_product", {"subsample": 3}, EVEN)  # which two devices could not cut
    for key_mask in (None, x[..., 0] > 0):
        found = []
        for sharded_axis in (None, 0):
            block = block_of(spec, params, sharded_axis=sharded_axis)
            (z, dx, _) = differentiated(block, tf.constant(x), dz, key_mask, training=True)
            found.append([z, dx, block.attention(x, [3], key_mask), *block.export_params().values()])
        assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(ValueError, match=r"`sharded_axis` must be one of the 2 spatial axes of `x`. Got 2"):
        block_of(spec, params, sharded_axis=2)(x)


@pytest.mark.parametrize(
    ("fault", "pairwise", "options", "spatial"),
    [
        ("statistics of one device", "embedded_gaussian", {}, EVEN),
        ("keys of one device counted", "dot_product", {}, EVEN),
        ("keys of one device", "dot_product", {}, EVEN),
        ("a gather without its mask", "embedded_gaussian", {}, EVEN),
        ("no share in the gradient of a sum", "dot_product", {}, EVEN),
        ("no share in the gradient of a gather", "concatenation", {}, (8,)),
        ("no share in the gradient of a parameter", "gaussian", {}, EVEN),
        ("windows across borders", "embedded_gaussian", {"subsample": 2}, (6, 4)),
    ],
)
def test_a_fault_is_found(fault, pairwise, options, spatial):
    spec, params, *arrays = given = case(pairwise, options, spatial, masked="mask" in fault)
    training, method = True, "auto"
    (found,) = processes(2)(work.faulty, fault, 2, 1, spec, params, arrays, None, training, method)
    with pytest.raises(AssertionError, match="differs from the reference"):
        assert_as_whole(found, *given)
