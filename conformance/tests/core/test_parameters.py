"""Parameters: their names and shapes, and the values with which a block starts."""

import re

import numpy as np
import pytest

from nonlocal_core import NonLocalSpec, init_params, nonlocal_block, param_shapes

LAYERS = {
    "theta": {"theta.weight": (3, 8), "theta.bias": (3,)},
    "phi": {"phi.weight": (3, 8), "phi.bias": (3,)},
    "g": {"g.weight": (3, 8), "g.bias": (3,)},
    "concat": {"concat.weight": (6,), "concat.bias": ()},
    "out": {"out.weight": (8, 3), "out.bias": (8,)},
    "affine": {"norm.weight": (8,), "norm.bias": (8,)},
    "batch": {"norm.weight": (8,), "norm.bias": (8,), "norm.mean": (8,), "norm.variance": (8,)},
}


@pytest.mark.parametrize(
    ("options", "layers", "absent"),
    [
        ({}, "theta phi g out", ()),
        ({"pairwise": "dot_product", "norm": "batch"}, "theta phi g out batch", ()),
        ({"pairwise": "gaussian", "norm": "affine"}, "g out affine", ()),
        ({"pairwise": "concatenation"}, "theta phi g concat out", ("concat.bias",)),
        ({"pairwise": "concatenation", "bias": {"concat": True}}, "theta phi g concat out", ()),
        ({"pairwise": max, "normalize": "count"}, "theta phi g out", ()),
        ({"pairwise": "gaussian", "bias": False}, "g out", ("g.bias", "out.bias")),
        ({"bias": {"phi": False, "out": False}}, "theta phi g out", ("phi.bias", "out.bias")),
        ({"norm": "batch", "bias": {"out": False}}, "theta phi g out batch", ("out.bias",)),
    ],
)
def test_the_spec_alone_decides_the_names_the_shapes_and_the_order(options, layers, absent):
    everything = {name: shape for layer in layers.split() for name, shape in LAYERS[layer].items()}
    expected = [(name, shape) for name, shape in everything.items() if name not in absent]
    spec = NonLocalSpec(channels=8, inner_channels=3, **options)
    assert list(param_shapes(spec).items()) == expected
    assert [(name, a.shape) for name, a in init_params(spec, np.random.default_rng(0)).items()] == expected


@pytest.mark.parametrize("options", [{"subsample": (2,)}, {"subsample": (2, 2)}, {"axes": "space"}])
def test_the_parameters_are_the_same_in_every_rank(options):
    assert param_shapes(NonLocalSpec(channels=8, **options)) == param_shapes(NonLocalSpec(channels=8))


@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
def test_new_arrays_are_float64(pairwise):
    params = init_params(NonLocalSpec(channels=8, pairwise=pairwise, norm="batch"), np.random.default_rng(0))
    assert {a.dtype.name for a in params.values()} == {"float64"}


@pytest.mark.parametrize("name", ["theta.weight", "phi.weight", "g.weight", "out.weight", "concat.weight"])
def test_new_weights_are_normal_with_deviation_one_hundredth(name):
    spec = NonLocalSpec(channels=64, inner_channels=4000, pairwise="concatenation", zero_init=False)
    values = init_params(spec, np.random.default_rng(7))[name].ravel()
    error = 5 / np.sqrt(values.size)
    assert values.mean() == pytest.approx(0, abs=0.01 * error)
    assert values.std() == pytest.approx(0.01, rel=error)
    # The fourth moment of a normal distribution is three times the square of its variance: not uniform.
    assert (values**4).mean() / values.var() ** 2 == pytest.approx(3, abs=6 * error)


ZEROS = {"theta.bias", "phi.bias", "g.bias", "out.bias", "concat.bias", "norm.bias", "norm.mean"}


@pytest.mark.parametrize(
    ("norm", "zero_init", "zeros", "ones"),
    [
        (None, True, {"out.weight"}, set()),
        (None, False, set(), set()),
        ("affine", True, {"norm.weight"}, set()),
        ("affine", False, set(), {"norm.weight"}),
        ("batch", True, {"norm.weight"}, {"norm.variance"}),
        ("batch", False, set(), {"norm.weight", "norm.variance"}),
    ],
)
def test_a_new_block_has_these_constants_and_no_others(norm, zero_init, zeros, ones):
    spec = NonLocalSpec(channels=8, pairwise="concatenation", bias={"concat": True}, norm=norm, zero_init=zero_init)
    params = init_params(spec, np.random.default_rng(0))
    assert {name for name, a in params.items() if (a == 0).all()} == (ZEROS | zeros) & params.keys()
    assert {name for name, a in params.items() if (a == 1).all()} == ones
    assert all(len(np.unique(a)) == a.size for name, a in params.items() if name not in ZEROS | zeros | ones)


@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("norm", [None, "affine", "batch"])
@pytest.mark.parametrize("zero_init", [True, False])
def test_a_new_block_is_the_identity_exactly_if_it_starts_at_zero(pairwise, norm, zero_init):
    spec = NonLocalSpec(channels=8, pairwise=pairwise, norm=norm, zero_init=zero_init)
    x = np.random.default_rng(1).normal(3, 2, size=(2, 5, 7, 8))
    z = nonlocal_block(x, init_params(spec, np.random.default_rng(0)), spec)
    assert np.array_equal(z, x) == zero_init


def test_a_new_block_without_a_residual_gives_zero():
    spec = NonLocalSpec(channels=8, residual=False)
    z = nonlocal_block(np.ones((1, 5, 8)), init_params(spec, np.random.default_rng(0)), spec)
    assert not z.any()


def test_equal_seeds_give_equal_parameters_and_others_do_not():
    spec = NonLocalSpec(channels=8)
    one, same, other = (init_params(spec, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["g.weight"], other["g.weight"])


def test_no_two_layers_start_alike():
    params = init_params(NonLocalSpec(channels=8), np.random.default_rng(0))
    assert not np.array_equal(params["theta.weight"], params["phi.weight"])
    assert not np.array_equal(params["phi.weight"], params["g.weight"])


@pytest.mark.parametrize("rng", [0, None, np.random.RandomState(0)])
def test_the_source_of_numbers_must_be_a_generator(rng):
    message = f"`rng` must be a numpy.random.Generator. Got {rng!r} of type {type(rng).__name__}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        init_params(NonLocalSpec(channels=8), rng)
