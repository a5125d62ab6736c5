"""Blocks whose positions are cut over devices, against the reference on the whole input."""

import jax
import jax.numpy as jnp
import jax_sharded as work
import numpy as np
import pytest
from flax import nnx

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, largest
from nonlocal_conformance.cases import Case
from nonlocal_conformance.drivers.jax import JaxDriver
from nonlocal_conformance.sharded.jax import process
from nonlocal_core.planning import exact_method
from nonlocal_jax import NonLocalBlock, insert_nonlocal, nonlocal_block

pytestmark = pytest.mark.usefixtures("_compile_fast")

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
EVEN, VOLUME = (8, 5), (8, 4, 3)
AT_INPUT = {"subsample": 2, "subsample_at": "input"}

CUTS = {
    "plain": ({}, EVEN, 1),
    "pooled": ({"subsample": 2}, (5, 8), 2),
    "pooled in the input": (AT_INPUT, EVEN, 1),
    "within space": ({"axes": "space"}, VOLUME, 2),
    "between frames": ({"axes": "space", **AT_INPUT}, VOLUME, 1),
    "within time": ({"axes": "time", "subsample": (2, 1, 1)}, VOLUME, 1),
    "between groups": ({"group_size": 2, "subsample": (1, 2, 1)}, VOLUME, 1),
    "within groups": ({"group_size": 4}, VOLUME, 2),
    "between samples": ({"subsample": 2}, EVEN, 0),
}
"""Options, spatial sizes, and which axis of the input is cut."""


def case(pairwise, options, spatial, *, masked=False, batch=4, dtype="float32"):
    """Return a spec with a norm, and parameters, an input, its gradient and a mask on which an error shows."""
    every = {"pairwise": pairwise, "norm": "batch", "residual": False, "zero_init": False, **options}
    made = Case("cut", every, spatial, batch=batch, mask="some" if masked else None)
    data = made.data(dtype)
    return made.spec, data.params, data.x, data.dz, data.key_mask


def wide(params):
    return {name: a.astype("float64") for name, a in params.items()}


def assert_as_whole(found, spec, params, x, dz, mask, *, training=True):
    """Compare z, the statistics and the gradients with those of the reference."""
    z, after, dx, dparams = found
    dtype, params, x, dz = x.dtype, wide(params), x.astype("float64"), dz.astype("float64")
    assert_close("z", z, nlc.nonlocal_block(x, params, spec, mask, training), dtype=dtype)
    expected_dx, expected = nlc.nonlocal_block_vjp(x, params, spec, dz, mask, training)
    assert_close("dx", dx, expected_dx, dtype=dtype)
    scale = largest(*expected.values())
    assert dparams.keys() == expected.keys()
    for name, a in dparams.items():
        assert_close(f"d{name}", a, expected[name], dtype=dtype, scale=scale)
    if training:
        for name, a in nlc.updated_statistics(x, params, spec, mask).items():
            assert_close(name, after[name], a, dtype=dtype)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pairwise", FORMS)
def test_a_cut_input_gives_what_the_whole_gives(pairwise, cut):
    (options, spatial, axis), index = CUTS[cut], list(CUTS).index(cut)
    # Of the masks, the methods and the numbers of devices each meets each form and each cut, and most other pairs.
    masked, exact = index % 2 == FORMS.index(pairwise) // 2, index // 2 % 2 == FORMS.index(pairwise) % 2
    given = case(pairwise, options, spatial, masked=masked)
    method = exact_method(pairwise) if exact else "pairwise"
    found = JaxDriver().sharded(*given, axis=axis, devices=2 if index % 3 == 1 else 4, training=True, method=method)
    assert_as_whole(found, *given)


@pytest.mark.parametrize("pairwise", FORMS)
def test_second_derivatives_are_those_of_the_whole(pairwise):
    spec, params, x, dz, mask = case(pairwise, {"subsample": 2}, EVEN, masked=True, dtype="float64")
    rng = np.random.default_rng(0)
    vx, vparams = rng.normal(size=x.shape), {name: rng.normal(size=a.shape) for name, a in params.items()}
    options = {"training": True, "method": exact_method(pairwise)}
    dx, dparams = JaxDriver().sharded_hvp(spec, params, x, dz, vx, vparams, mask, axis=1, devices=4, **options)
    expected_x, expected = JaxDriver().hvp(spec, params, x, dz, vx, vparams, mask, **options)
    scale = largest(expected_x, *expected.values())
    assert_close("the input's", dx, expected_x, dtype="float64", scale=scale)
    for name, a in expected.items():
        assert_close(name, dparams[name], a, dtype="float64", scale=scale)


N, C, INNER = 64, 7, 5


@pytest.mark.parametrize(
    ("pairwise", "options", "elements"),
    [
        ("dot_product", {}, 2 * INNER * INNER),
        ("dot_product", {"subsample": 16}, 4 * 2 * INNER),
        ("concatenation", {}, N * (INNER + 1)),
        ("embedded_gaussian", {"subsample": 2}, N / 2 * 2 * INNER),
        ("gaussian", AT_INPUT, N / 2 * (C + INNER)),
    ],
)
def test_no_more_is_sent_than_the_formulas_say(pairwise, options, elements):
    spec, params, x, _, _ = case(pairwise, {**options, "norm": None}, (N,), batch=1)
    for devices in (2, 4):
        expected = elements * (devices - 1) / devices
        assert JaxDriver().traffic(spec, params, x, axis=1, devices=devices) == (expected, expected)


@pytest.mark.parametrize("options", [{"axes": "space"}, {"group_size": 2}])
def test_a_cut_between_sets_sends_nothing(options):
    spec, params, x, _, mask = case("embedded_gaussian", {"norm": None, **options}, VOLUME, masked=True)
    assert JaxDriver().traffic(spec, params, x, mask, axis=1, devices=4) == (0, 0)


def test_memory_falls_with_the_number_of_devices():
    spec, params, x, dz, _ = case("dot_product", {"norm": None}, (4096,), batch=1)
    alone, two, four = (
        JaxDriver().sharded_memory(spec, params, x, dz, axis=1, devices=devices) for devices in (1, 2, 4)
    )
    assert two < 1.05 * alone / 2
    assert four < 1.05 * alone / 4


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_a_block_is_cut_along_samples_and_positions_at_once(pairwise):
    given = case(pairwise, {"subsample": 2}, EVEN, masked=True)
    assert_as_whole(process()(work.module, *given)[0], *given)


@pytest.mark.parametrize("pairwise", FORMS)
def test_arrays_over_devices_need_no_map(pairwise):
    given = case(pairwise, {"subsample": 2}, EVEN, masked=True)
    *found, _ = process()(work.whole, *given)[0]
    assert_as_whole(found, *given)


def test_the_dot_product_of_arrays_over_devices_sends_as_much_whatever_their_size():
    sent = {process()(work.whole, *case("dot_product", {}, (size,), masked=True))[0][-1] for size in (64, 256)}
    assert len(sent) == 1
    assert sent.pop() > 0


def mapped(function, x, axis=1):
    """Call a function on two pieces of x under the name "parts"."""
    pieces = jnp.stack(jnp.split(x, 2, axis=axis))
    return jax.jit(jax.vmap(function, axis_name="parts"))(pieces)


def test_any_map_with_a_name_cuts():
    spec, params, x, _, _ = case("concatenation", {"subsample": 2}, EVEN)
    z = mapped(lambda x: nonlocal_block(x, params, spec, training=True, axis_name="parts", sharded_axis=0), x)
    expected = nlc.nonlocal_block(x.astype("float64"), wide(params), spec, training=True)
    assert_close("z", np.concatenate(z, axis=1), expected, dtype="float32")
    with pytest.raises(NameError, match="parts"):
        nonlocal_block(x, params, spec, axis_name="parts", sharded_axis=0)


def test_a_device_may_have_one_value_of_those_of_which_the_statistics_are():
    spec, params, x, _, _ = case("dot_product", {}, (2,), batch=1)
    z = mapped(lambda x: nonlocal_block(x, params, spec, training=True, axis_name="parts", sharded_axis=0), x)
    expected = nlc.nonlocal_block(x.astype("float64"), wide(params), spec, training=True)
    assert_close("z", np.concatenate(z, axis=1), expected, dtype="float32")


def test_an_inserted_block_cuts_what_it_gets():
    model, x = nnx.Sequential(nnx.Linear(3, 6, rngs=nnx.Rngs(0))), np.ones((2, 8, 5, 3), "float32")
    names = {"axis_name": "parts", "norm_axis_name": ("parts",), "sharded_axis": 1}
    insert_nonlocal(model, ["layers.0"], rngs=nnx.Rngs(0), example_input=x, norm="batch", **names)
    block = model.layers[0].nonlocal_block.fold_norm()
    assert {name: getattr(block, name) for name in names} == names


X = jnp.ones((1, 8, 6, 4))


def block_of(**options):
    return NonLocalBlock(4, rngs=nnx.Rngs(0), **{"axis_name": "parts", "sharded_axis": 0, **options})


ERRORS = {
    "window": (
        lambda: mapped(block_of(subsample=3), X),
        r"`x` must be cut between windows of `subsample`, 3 here, .* Got 8 positions .* axis 0 in pieces of \[4, 4\]",
    ),
    "window of the second axis": (
        lambda: mapped(block_of(subsample=2, sharded_axis=1), X, axis=2),
        r"windows of `subsample`, 2 here, .* Got 6 positions along spatial axis 1 in pieces of \[3, 3\]",
    ),
    "groups": (
        lambda: mapped(block_of(group_size=2), jnp.ones((1, 6, 2, 2, 4))),
        r"`x` must be cut between groups of `group_size=2` frames. Got 6 .* pieces of \[3, 3\]",
    ),
    "groups of the whole": (
        lambda: mapped(block_of(group_size=4), jnp.ones((1, 6, 2, 2, 4))),
        r"`group_size` must divide the number of frames. Got 4 for 6 frames",
    ),
    "axis": (lambda: mapped(block_of(sharded_axis=2), X), "`sharded_axis` must be one of the 2 spatial axes"),
    "negative axis": (lambda: block_of(sharded_axis=-1), "`sharded_axis` must be a spatial axis of `x`, .* Got -1"),
    "no name": (lambda: block_of(axis_name=None), "`axis_name` must name the mapped axis .* Got None"),
    "attention": (lambda: block_of().attention(X), "`sharded_axis` must be None for the attention, .* Got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_cut_that_cannot_serve_is_an_error(name):
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("fault", "pairwise", "options", "spatial"),
    [
        ("statistics of one device", "embedded_gaussian", {}, EVEN),
        ("keys of one device counted", "dot_product", {}, EVEN),
        ("keys of one device", "concatenation", {}, EVEN),
        ("a gather without its mask", "embedded_gaussian", {}, EVEN),
        ("no share in the gradient of a sum", "dot_product", {}, EVEN),
        ("no share in the gradient of keys", "gaussian", {}, EVEN),
        ("windows across borders", "dot_product", {"subsample": 2}, (12, 4)),
    ],
)
def test_a_fault_is_found(fault, pairwise, options, spatial):
    given = case(pairwise, options, spatial, masked="windows" not in fault)
    found = process()(work.faulty, fault, *given, axis=1, devices=4, training=True)[0]
    with pytest.raises(AssertionError, match="differs from the reference"):
        assert_as_whole(found, *given)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_kernel_gets_whole_sets_of_an_input_that_is_divided(axis):
    shapes, actual, expected = process()(work.fused_attention, axis)[0]
    assert {shape[1:] for shape in shapes} == {(8, 1, 8)}
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.03 * np.abs(b).max())
