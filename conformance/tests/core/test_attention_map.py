"""Rows of weights on the grid of positions: where keys lie, what they cover, which are the strongest."""

import numpy as np
import pytest
import torch

from nonlocal_core import AttentionMap, NonLocalSpec, attention, init_params

CASES = {
    "sequence": ((7,), {}, (7,)),
    "pooled sequence": ((7,), {"subsample": 2}, (3,)),
    "image": ((3, 5), {}, (3, 5)),
    "pooled image": ((5, 7), {"subsample": (2, 3)}, (2, 2)),
    "pooled video": ((3, 5, 4), {"subsample": (2, 2, 3)}, (1, 2, 1)),
    "rows": ((3, 5), {"axes": (1,), "subsample": 2}, (3, 2)),
    "rows over time": ((4, 2, 5), {"axes": (0, 2), "subsample": (3, 1, 2)}, (1, 2, 2)),
    "space": ((3, 5, 4), {"axes": "space", "subsample": 2}, (3, 2, 2)),
    "time": ((7, 2, 3), {"axes": "time", "subsample": (3, 1, 1)}, (2, 2, 3)),
    "groups": ((4, 3, 2), {"group_size": 2}, (4, 3, 2)),
    "pooled groups": ((10, 3, 4), {"group_size": 5, "subsample": 2}, (4, 1, 2)),
}
EACH = pytest.mark.parametrize(("sizes", "options", "key_sizes"), CASES.values(), ids=CASES)


def own_place(sizes, options):
    """Return the map of every position where each knows itself alone: its weight is all on the key that covers it."""
    count = int(np.prod(sizes))
    spec = NonLocalSpec(channels=count, pairwise="gaussian", scale=50.0, **options)
    x = np.eye(count).reshape(1, *sizes, count)
    positions = np.arange(count)
    weights = attention(x, init_params(spec, np.random.default_rng(0)), spec, positions)
    return AttentionMap(weights, positions, sizes, spec)


@EACH
def test_a_key_lies_where_the_positions_are_that_it_covers(sizes, options, key_sizes):
    found = own_place(sizes, options)
    count = len(found.positions)
    (grid,) = found.on_grid().reshape(1, count, count)
    covered = ~np.isnan(np.diagonal(grid))
    assert (grid[covered, found.positions[covered]] > 0.99).all()
    assert ((grid[covered] > 0.99).sum(axis=1) == np.prod(found.window)).all()
    assert covered.sum() == np.prod(key_sizes) * np.prod(found.window)


@EACH
def test_positions_that_are_no_key_of_the_query_are_not_numbers(sizes, options, key_sizes):
    spec = NonLocalSpec(channels=4, **options)
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=array.shape) for name, array in init_params(spec, rng).items()}
    weights = attention(rng.normal(size=(2, *sizes, 4)), params, spec)
    found = AttentionMap(weights, np.arange(np.prod(sizes)), sizes, spec)
    grid = found.on_grid().reshape(*weights.shape[:2], -1)
    assert found.key_sizes == key_sizes
    assert ((~np.isnan(grid)).sum(axis=-1) == found.keys_per_query * np.prod(found.window)).all()
    assert np.nanmin(grid) > 0
    np.testing.assert_allclose(np.nansum(grid, axis=-1) / np.prod(found.window), 1, rtol=1e-12)


@EACH
def test_the_coordinates_of_a_key_are_the_middle_of_what_it_covers(sizes, options, key_sizes):
    found = own_place(sizes, options)
    # All positions whose whole weight is on one key are those that it covers.
    keys, covered = found.weights[0].argmax(axis=-1), found.weights[0].max(axis=-1) > 0.99
    middles = [found.coordinates()[covered & (keys == key)].mean(axis=0) for key in range(np.prod(key_sizes))]
    np.testing.assert_allclose(found.key_coordinates(), middles, rtol=1e-15)


@pytest.mark.parametrize(
    ("case", "window", "keys"),
    [
        ("pooled video", (2, 2, 3), 2),
        ("rows over time", (3, 1, 2), 2),
        ("time", (3, 1, 1), 2),
        ("groups", (1, 1, 1), 12),
        ("pooled groups", (2, 2, 2), 4),
    ],
)
def test_a_query_chooses_among_the_keys_of_its_set(case, window, keys):
    sizes, options, key_sizes = CASES[case]
    weights = np.zeros((1, 0, np.prod(key_sizes)))
    found = AttentionMap(weights, [], sizes, NonLocalSpec(channels=2, **options))
    assert (found.window, found.keys_per_query) == (window, keys)


def test_a_group_without_a_whole_last_window_leaves_its_last_frame_bare():
    spec = NonLocalSpec(channels=2, group_size=3, subsample=(2, 1, 1))
    found = AttentionMap(np.array([[[0.25, 0.75]]]), [4], (6, 1, 1), spec)
    nan = np.nan
    np.testing.assert_array_equal(found.on_grid()[0, 0, :, 0, 0], [nan, nan, nan, 0.75, 0.75, nan])
    np.testing.assert_array_equal(found.key_coordinates()[:, 0], [0.5, 3.5])


def test_without_positions_every_position_is_a_query():
    found = AttentionMap(np.zeros((1, 15, 15)), None, (3, 5), NonLocalSpec(channels=2))
    np.testing.assert_array_equal(found.positions, np.arange(15))


def test_it_is_shown_without_its_numbers():
    spec = NonLocalSpec(channels=2)
    found = AttentionMap(np.zeros((2, 1, 15)), [7], (3, 5), spec)
    expected = f"AttentionMap(weights of shape (2, 1, 15), positions of shape (1,), sizes=(3, 5), spec={spec})"
    assert repr(found) == expected


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", "float32"), ("float16", "float16"), ("float64", "float64")])
def test_weights_of_torch_are_kept_without_their_gradient(dtype, kept):
    weights = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=getattr(torch, dtype), requires_grad=True)
    found = AttentionMap(weights, [1], (3,), NonLocalSpec(channels=2))
    np.testing.assert_array_equal(found.weights, np.array([[[0.5, 0.25, 0.25]]], kept), strict=True)


def test_queries_have_coordinates():
    found = AttentionMap(np.zeros((1, 3, 15)), [0, 7, 14], (3, 5), NonLocalSpec(channels=2))
    np.testing.assert_array_equal(found.coordinates(), [[0, 0], [1, 2], [2, 4]])


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_weights_on_the_grid_are_at_least_single_precision(dtype, expected):
    found = AttentionMap(np.ones((1, 1, 3), dtype), [1], (3,), NonLocalSpec(channels=2))
    assert found.on_grid().dtype == expected


# The strongest keys


def test_the_strongest_keys_come_first_for_each_sample_and_query():
    weights = np.array([[[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]], [[0.2, 0.1, 0.7], [0.0, 0.9, 0.1]]])
    keys, values = AttentionMap(weights, [0, 2], (3,), NonLocalSpec(channels=2)).strongest(2)
    np.testing.assert_array_equal(keys, [[[1, 2], [0, 2]], [[2, 0], [1, 2]]])
    np.testing.assert_array_equal(values, [[[0.6, 0.3], [0.5, 0.3]], [[0.7, 0.2], [0.9, 0.1]]])


def test_of_weights_with_a_sign_the_largest_magnitude_is_the_strongest():
    spec = NonLocalSpec(channels=2, pairwise="dot_product")
    keys, values = AttentionMap(np.array([[[0.5, -2.0, 0.0, 1.0]]]), [0], (4,), spec).strongest(3)
    np.testing.assert_array_equal(keys, [[[1, 3, 0]]])
    np.testing.assert_array_equal(values, [[[-2.0, 1.0, 0.5]]])


def test_keys_outside_the_set_are_not_taken_even_among_weights_of_zero():
    spec = NonLocalSpec(channels=2, pairwise="concatenation", axes=(1,))
    keys, _ = AttentionMap(np.zeros((1, 1, 6)), [4], (2, 3), spec).strongest(3)
    np.testing.assert_array_equal(keys, [[[3, 4, 5]]])


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (4, ValueError, "`count` must be at most 3, the number of keys of a query. Got 4"),
        (0, ValueError, "`count` must be a positive int. Got 0"),
        (1.5, TypeError, "`count` must be a positive int. Got 1.5 of type float"),
    ],
)
def test_a_count_that_cannot_be_is_refused(count, error, words):
    found = AttentionMap(np.zeros((1, 1, 6)), [4], (2, 3), NonLocalSpec(channels=2, axes=(1,)))
    with pytest.raises(error, match=words):
        found.strongest(count)


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"weights": np.zeros((1, 2, 5))},
            ValueError,
            r"`weights` must have shape \(B, 2, 6\). Got shape \(1, 2, 5\)",
        ),
        ({"weights": np.zeros((1, 1, 6))}, ValueError, r"`weights` must have shape \(B, 2, 6\)"),
        ({"weights": np.zeros((2, 6))}, ValueError, r"`weights` must have shape \(B, 2, 6\)"),
        ({"positions": [0, 35]}, ValueError, r"`positions` must be flat indices from 0 to 34. Got \[0, 35\]"),
        ({"positions": [0.5, 1]}, TypeError, "`positions` must be a one-dimensional sequence of ints"),
        ({"sizes": (1, 7)}, ValueError, "`subsample` must leave at least one window on spatial axis 0"),
        ({"sizes": (5, 7, 2, 2)}, ValueError, "1, 2 or 3 spatial axes"),
        ({"weights": np.zeros((1, 2, 6), int)}, TypeError, "`weights` must be an array of float16, .*Got dtype int64"),
        ({"weights": np.zeros((1, 2, 6), complex)}, TypeError, "`weights` must be an array of .*Got dtype complex128"),
        ({"weights": np.zeros((1, 2, 6), object)}, TypeError, "`weights` must be an array of .*Got dtype object"),
        ({"weights": np.full((1, 2, 6), "0.5")}, TypeError, "`weights` must be an array of .*Got dtype <U3"),
        ({"sizes": 9}, TypeError, "`sizes` must be a sequence of positive ints. Got 9 of type int"),
        ({"sizes": None}, TypeError, "`sizes` must be a sequence of positive ints. Got None of type NoneType"),
        ({"sizes": (5, 0)}, ValueError, "`sizes` must be a positive int. Got 0"),
        ({"sizes": (5, 7.0)}, TypeError, "`sizes` must be a positive int. Got 7.0 of type float"),
        ({"spec": "gaussian"}, TypeError, "`spec` must be a NonLocalSpec. Got 'gaussian' of type str"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, error, words):
    spec = NonLocalSpec(channels=2, subsample=2)
    arguments = {"weights": np.zeros((1, 2, 6)), "positions": [0, 34], "sizes": (5, 7), "spec": spec}
    AttentionMap(**arguments)
    with pytest.raises(error, match=words):
        AttentionMap(**{**arguments, **changes})
