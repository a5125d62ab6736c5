"""Blocks whose positions are cut over replicas, against the reference on the whole input."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_sharded as work

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, largest
from nonlocal_conformance.cases import Case
from nonlocal_conformance.drivers.tensorflow import TensorflowDriver
from nonlocal_conformance.sharded.tensorflow import block_of, differentiated, processes
from nonlocal_tensorflow import NonLocalBlock, insert_nonlocal

DRIVER = TensorflowDriver()
FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
EVEN = (8, 5)

CUTS = {
    "samples": ({}, EVEN, 0, 2),
    "four": ({}, EVEN, 1, 4),
    "the last axis, pooled": ({"subsample": 2, "subsample_at": "input"}, (5, 8), 2, 2),
    "within groups": ({"group_size": 4, "subsample": (1, 2, 1)}, (8, 4, 3), 2, 2),
}
"""Options, spatial sizes, the axis of the input that is cut, and how many devices cut it."""


def case(pairwise, options, spatial, *, masked=False, dtype="float32"):
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


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pairwise", FORMS)
def test_a_cut_input_gives_what_the_whole_gives(pairwise, cut, masked):
    options, spatial, axis, devices = CUTS[cut]
    given = case(pairwise, options, spatial, masked=masked)
    assert_as_whole(DRIVER.sharded(*given, axis=axis, devices=devices, training=True), *given)


@pytest.mark.parametrize("method", ["pairwise", "auto"])
def test_where_keys_are_few_they_are_sent_rather_than_their_products(method):
    given = case("dot_product", {"subsample": 4}, (16,), masked=method == "auto")
    assert_as_whole(DRIVER.sharded(*given, axis=1, devices=4, training=True, method=method), *given)


def test_statistics_may_be_of_one_value_from_each_device():
    given = case("dot_product", {}, (1,))
    assert_as_whole(DRIVER.sharded(*given, axis=0, devices=4, training=True), *given)


def test_without_training_the_running_statistics_serve_and_stay():
    spec, params, x, dz, mask = case("embedded_gaussian", {}, EVEN, masked=True, dtype="float64")
    z, statistics, *_ = DRIVER.sharded(spec, params, x, dz, mask, axis=1, devices=2)
    assert_close("z", z, nlc.nonlocal_block(x, params, spec, mask), dtype="float64")
    assert all((statistics[name] == params[name]).all() for name in statistics)


@pytest.mark.parametrize("pairwise", ["dot_product", "concatenation"])
def test_a_traced_function_takes_pieces_of_unknown_sizes(pairwise):
    given = case(pairwise, {"subsample": 2}, EVEN, masked=True)
    assert_as_whole(*processes(2)(work.traced, 2, *given), *given)


@pytest.mark.parametrize(
    "options", [{}, {"pairwise": "concatenation"}, {"pairwise": work.squared, "normalize": "count"}]
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("data_format", "dim"), [("channels_first", 3), ("channels_last", 2)])
def test_other_layouts_precisions_and_functions_are_cut_too(data_format, dim, policy, options):
    given = {"norm": "batch", "data_format": data_format, "dtype": policy, **options}
    shape = (2, 4, 4, 6) if dim == 2 else (2, 6, 4, 4)
    ((found, expected),) = processes(2)(
        work.called, np.random.default_rng(1).normal(size=shape).astype("float32"), dim, given
    )
    assert np.abs(found - expected).max() <= (1e-5 if policy == "float32" else 0.02) * np.abs(expected).max()


ERRORS = {
    "window": r"`x` must be cut between windows of `subsample`, 2 here, one for each device. Got 6 .* of \[3, 3\]",
    "small window": r"`x` must be cut between windows of `subsample`, 8 here, .* in pieces of \[3, 3\]",
    "window of a new block": r"`x` must be cut between windows of `subsample`, 2 here, .* in pieces of \[3, 3\]",
    "groups": r"`x` must be cut between groups of `group_size=2` frames. Got 6 .* along spatial axis 0 .* \[3, 3\]",
    "groups of a new block": r"`x` must be cut between groups of `group_size=2` frames",
    "no position": r"`x` must have positions for every device that it is cut over. Got 1 .* in pieces of \[1, 0\]",
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
    model = keras.Sequential([keras.Input((4, 4, 6)), keras.layers.Dense(6, name="dense")])
    larger, _ = insert_nonlocal(model, ["dense"], norm="batch", sharded_axis=1, synchronized=True)
    assert (larger.layers[-1].sharded_axis, larger.layers[-1].synchronized) == (1, True)


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
