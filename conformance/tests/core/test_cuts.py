"""Where an input may be cut over devices, and what they send."""

import pytest

from nonlocal_core import NonLocalSpec
from nonlocal_core.planning import sends_products
from nonlocal_core.spec.cuts import check_pieces, inner_axis

EVERY, POOLED, GROUPS = {}, {"subsample": 2}, {"group_size": 4, "subsample": (2, 1, 3)}


@pytest.mark.parametrize(
    ("options", "axes"),
    [(EVERY, [0, 1, 2]), (GROUPS, [None, 1, 2]), ({"axes": "space"}, [None, 0, 1]), ({"axes": (1,)}, [None, 0, None])],
)
def test_an_axis_of_a_set_is_known_by_its_place_among_those_that_interact(options, axes):
    spec = NonLocalSpec(channels=4, **options)
    assert [inner_axis(spec, 3, axis) for axis in range(3)] == axes


@pytest.mark.parametrize(
    ("options", "axis", "pieces"),
    [
        (EVERY, 0, [1, 3, 2]),
        (POOLED, 1, [2, 4, 3]),
        (GROUPS, 0, [4, 8]),
        (GROUPS, 1, [1, 1]),
        (GROUPS, 2, [3, 4]),
        ({"axes": "space", **POOLED}, 0, [1, 1]),
    ],
)
def test_a_cut_between_windows_and_groups_is_served(options, axis, pieces):
    check_pieces(NonLocalSpec(channels=4, **options), 3, axis, pieces)


@pytest.mark.parametrize(
    ("options", "axis", "pieces", "rule"),
    [
        (EVERY, 0, [3, 0], "have positions for every device that it is cut over"),
        ({"axes": "space"}, 0, [1, 0], "have positions for every device that it is cut over"),
        (POOLED, 1, [3, 3], "be cut between windows of `subsample`, 2 here, one for each device"),
        (POOLED, 1, [4, 1], "be cut between windows of `subsample`, 2 here, one for each device"),
        (GROUPS, 2, [3, 4, 3], "be cut between windows of `subsample`, 3 here, one for each device"),
        (GROUPS, 0, [6, 6], "be cut between groups of `group_size=4` frames"),
        (GROUPS, 0, [4, 6], "be cut between groups of `group_size=4` frames"),
    ],
)
def test_another_cut_is_an_error_that_says_where_it_is(options, axis, pieces, rule):
    got = f"Got {sum(pieces)} positions along spatial axis {axis} in pieces of {pieces}."
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared as a whole
        check_pieces(NonLocalSpec(channels=4, **options), 3, axis, pieces)
    assert str(error.value) == f"`x` must {rule}. {got}"


@pytest.mark.parametrize(("keys", "is_less"), [(3, False), (4, True), (5, True), (None, True)])
def test_products_are_sent_unless_keys_are_fewer_numbers(keys, is_less):
    assert sends_products(keys, 3, 6) == is_less
    assert sends_products(keys, None, 6)
    assert sends_products(keys, 3, None)
