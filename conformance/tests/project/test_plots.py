"""Pictures of attention: that they show the numbers of the map, each in its place, and what is refused."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from nonlocal_core import AttentionMap, NonLocalSpec
from nonlocal_core.plots import arrows, heatmaps

HEAT = {"YlOrRd", "RdBu_r", "magma"}
GREY = np.array([0.299, 0.587, 0.114])
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _figures():
    """Draw without a screen, and leave no figure open."""
    mpl.use("Agg")
    assert plt.get_fignums() == []
    yield
    plt.close("all")


def found_in(sizes, positions, *, samples=1, low=0.0, **options):
    """Return a map of random weights of at least `low` for keys of the query, 0 for others."""
    spec = NonLocalSpec(channels=4, **options)
    keys = np.prod(AttentionMap(np.zeros((1, 0, count_keys(sizes, spec))), [], sizes, spec).key_sizes)
    weights = RNG.uniform(low, 1, size=(samples, len(positions), keys))
    return AttentionMap(weights, positions, sizes, spec)


def count_keys(sizes, spec):
    sets = spec.sets(sizes)
    return sets.count * sets.keys


def panels(figure):
    """Return the axes that show weights, with the image of these, in the order of drawing."""
    found = [(axis, image) for axis in figure.axes for image in axis.images]
    return [(axis, image) for axis, image in found if image.get_cmap().name in HEAT and image.get_array().ndim == 2]


def drawn(figure):
    """Return the weights that are drawn, (panels, rows, columns), NaN where none is."""
    return np.stack([np.ma.filled(image.get_array().astype(float), np.nan) for _, image in panels(figure)])


def bars(figure):
    """Return the colour bars."""
    return [image.colorbar for _, image in panels(figure) if image.colorbar is not None]


def extents(axis):
    """Return left, right, bottom and top of the images."""
    return [tuple(image.get_extent()) for image in axis.images]


def rings(axis):
    """Return the places of the rings, as rows and columns."""
    return [(line.get_ydata()[0], line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"]


def words(figure):
    """Return the texts of the legend."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def rectangles(axis):
    """Return left, top, width and height of the rectangles."""
    boxes = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    return [(*box.get_xy(), box.get_width(), box.get_height()) for box in boxes]


def hatched(axis, shape):
    """Return which positions of a grid the hatched rectangles cover."""
    rows, columns = np.indices(shape)
    covered = np.zeros(shape, dtype=int)
    for left, top, width, height in rectangles(axis):
        covered += (rows > top) & (rows < top + height) & (columns > left) & (columns < left + width)
    return covered


# Heat maps


@pytest.mark.parametrize("subsample", [None, 2, (1, 3)])
@pytest.mark.parametrize(
    "image", [None, np.zeros((50, 70)), np.zeros((50, 70, 3), np.uint8)], ids=["bare", "grey", "rgb"]
)
def test_an_image_shows_the_weights_of_each_query_in_their_places(subsample, image):
    found = found_in((5, 7), [0, 12, 34], subsample=subsample)
    figure = heatmaps(found, image)
    np.testing.assert_array_equal(drawn(figure), found.on_grid()[0])
    assert {extent for axis in figure.axes for extent in extents(axis)} == {(-0.5, 6.5, 4.5, -0.5)}
    assert [rings(axis) for axis, _ in panels(figure)] == [[(0, 0)], [(1, 5)], [(4, 6)]]
    assert [axis.get_title() for axis, _ in panels(figure)] == [
        "1: row 0, column 0",
        "2: row 1, column 5",
        "3: row 4, column 6",
    ]


@pytest.mark.parametrize("frames", [None, np.zeros((3, 20, 28, 3))], ids=["bare", "rgb"])
def test_a_video_has_a_row_of_frames_for_each_query(frames):
    found = found_in((3, 5, 7), [0, 71], subsample=2)
    figure = heatmaps(found, frames=frames)
    np.testing.assert_array_equal(drawn(figure).reshape(2, 3, 5, 7), found.on_grid()[0])
    places = [rings(axis) for axis, _ in panels(figure)]
    assert places == [[(0, 0)], [], [], [], [], [(0, 1)]]
    labels = [axis.get_ylabel() for axis, _ in panels(figure) if axis.get_ylabel()]
    assert labels == ["1: frame 0\nrow 0, column 0", "2: frame 2\nrow 0, column 1"]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["frame 0", "frame 1", "frame 2"]


def test_a_sequence_has_a_strip_for_each_query():
    found = found_in((7,), [2, 6], subsample=3)
    figure = heatmaps(found)
    np.testing.assert_array_equal(drawn(figure)[:, 0], found.on_grid()[0])
    assert [rings(axis) for axis, _ in panels(figure)] == [[(0, 2)], [(0, 6)]]
    assert [axis.get_title(loc="left") for axis, _ in panels(figure)] == ["1: position 2", "2: position 6"]


def test_the_chosen_sample_is_drawn():
    found = found_in((3, 5), [4], samples=3)
    np.testing.assert_array_equal(drawn(heatmaps(found, batch=1)), found.on_grid()[1])


def test_a_picture_lies_on_the_whole_grid_in_its_own_proportions():
    found = found_in((5, 7), [0])
    picture = RNG.uniform(size=(49, 71, 3))
    figure = heatmaps(found, picture)
    first, under = (figure.axes[index].images[0] for index in (0, 1))
    np.testing.assert_array_equal(first.get_array(), picture)
    np.testing.assert_allclose(under.get_array(), 0.35 + 0.65 * (picture @ GREY), rtol=1e-12)
    assert figure.axes[1].get_aspect() == pytest.approx((49 / 5) / (71 / 7))


def test_the_pictures_carry_the_numbers_of_the_queries():
    figure = heatmaps(found_in((3, 5, 7), [0, 71, 36]), frames=np.zeros((3, 5, 7)))
    numbers = [[text.get_text() for text in axis.texts] for axis in figure.axes[:3]]
    assert numbers == [["1"], ["3"], ["2"]]
    assert [rings(axis) for axis in figure.axes[:3]] == [[(0, 0)], [(0, 1)], [(0, 1)]]


def test_bytes_and_floats_are_the_same_picture():
    found, picture = found_in((3, 5), [0]), RNG.integers(0, 256, size=(6, 10, 3), dtype=np.uint8)
    shown = [heatmaps(found, image).axes[0].images[0].get_array() for image in (picture, picture / 255)]
    np.testing.assert_array_equal(*shown)


def test_of_several_frames_in_the_place_of_one_the_middle_is_shown():
    frames = np.repeat(np.linspace(0, 1, 6), 35).reshape(6, 5, 7)
    figure = heatmaps(found_in((2, 5, 7), [0]), frames=frames)
    shown = [axis.images[0].get_array()[0, 0] for axis in figure.axes[:2]]
    np.testing.assert_allclose(shown, [0.2, 0.8], rtol=1e-12)


@pytest.mark.parametrize("frames", [np.ones((2, 6, 10)) + 1e-5, np.zeros((2, 6, 10)) - 1e-5])
def test_a_rounding_beyond_the_range_is_no_error(frames):
    shown = heatmaps(found_in((2, 3, 5), [0]), frames=frames).axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, np.round(frames[0]))


# Scales


@pytest.mark.parametrize(
    ("pairwise", "low", "limits", "colours"),
    [
        ("gaussian", 0.0, (0, 1), "YlOrRd"),
        ("embedded_gaussian", 0.0, (0, 1), "YlOrRd"),
        ("concatenation", 0.0, (0, 1), "YlOrRd"),
        ("dot_product", -1.0, (-1, 1), "RdBu_r"),
        ("dot_product", 0.0, (-1, 1), "RdBu_r"),
        (lambda theta, phi: theta @ phi.mT, 0.0, (0, 1), "YlOrRd"),
        (lambda theta, phi: theta @ phi.mT, -1.0, (-1, 1), "RdBu_r"),
    ],
)
def test_the_scale_begins_at_zero_or_has_it_in_the_middle(pairwise, low, limits, colours):
    normalize = None if isinstance(pairwise, str) else "count"
    found = found_in((3, 5), [0, 7], low=low, pairwise=pairwise, normalize=normalize)
    images = [image for _, image in panels(heatmaps(found))]
    ends = abs(found.weights[0]).max(axis=-1)
    np.testing.assert_allclose([image.get_clim() for image in images], ends[:, None] * limits, rtol=1e-15)
    assert {image.get_cmap().name for image in images} == {colours}


def test_a_negative_scale_of_the_concatenation_form_is_seen_as_a_sign():
    found = found_in((3, 5), [0], pairwise="concatenation", scale=-1.0)
    negative = AttentionMap(-found.weights, found.positions, found.sizes, found.spec)
    ((_, image),) = panels(heatmaps(negative))
    assert image.get_clim() == (-found.weights.max(), found.weights.max())


def test_the_end_of_the_scale_can_be_chosen_for_all():
    figure = heatmaps(found_in((3, 5), [0, 7]), largest=0.25)
    assert [image.get_clim() for _, image in panels(figure)] == [(0, 0.25)] * 2
    assert [image.colorbar.extend for _, image in panels(figure)] == ["max"] * 2


def test_weights_of_both_signs_may_lie_beyond_both_ends():
    found = found_in((3, 5), [0], low=-1.0, pairwise="dot_product")
    ((_, image),) = panels(heatmaps(found, largest=0.25))
    assert (image.get_clim(), image.colorbar.extend) == ((-0.25, 0.25), "both")


def test_weights_that_are_all_zero_have_a_scale():
    zero = AttentionMap(np.zeros((1, 1, 15)), [0], (3, 5), NonLocalSpec(channels=4, pairwise="concatenation"))
    ((_, image),) = panels(heatmaps(zero))
    assert image.get_clim() == (0, 1)


def test_the_colour_map_can_be_chosen():
    ((_, image),) = panels(heatmaps(found_in((3, 5), [0]), cmap="magma"))
    assert image.get_cmap() == mpl.colormaps["magma"]


@pytest.mark.parametrize(("pairwise", "at"), [("gaussian", [0, 0.25, 1]), ("dot_product", [0.5, 0.625, 1, 0.375, 0])])
@pytest.mark.parametrize("cmap", [None, "magma"])
def test_over_a_picture_a_weight_has_the_same_hue_and_the_less_the_smaller_it_is(pairwise, at, cmap):
    found = found_in((3, 5), [0], pairwise=pairwise)
    bare, over = (panels(heatmaps(found, image, cmap=cmap))[0][1].get_cmap()(at) for image in (None, np.zeros((6, 10))))
    np.testing.assert_allclose(over[:, :3], bare[:, :3], atol=0.02)
    np.testing.assert_allclose(over[:, 3], [0, 0.5, 1, 0.5, 1][: len(at)], atol=0.05)
    assert (bare[:, 3] == 1).all()


@pytest.mark.parametrize(("options", "keys"), [({}, 60), ({"subsample": 2}, 4), ({"group_size": 2, "subsample": 2}, 2)])
def test_softmax_weights_have_a_mark_where_all_keys_are_equal(options, keys):
    figure = heatmaps(found_in((4, 3, 5), [0], **options))
    (bar,) = bars(figure)
    (mark,) = (line for line in bar.ax.lines if line.get_marker() == ">")
    assert mark.get_ydata()[0] == pytest.approx(1 / keys)
    assert f"1/{keys}, were all keys equal" in words(figure)
    assert figure.get_suptitle() == f"embedded gaussian: weights of {keys} keys, which sum to 1"


def triangles(figure):
    """Return the heights of the triangles at the colour bars."""
    return [line.get_ydata()[0] for bar in bars(figure) for line in bar.ax.lines if line.get_marker() == ">"]


# With 25, 49, 100 or 121 keys the float32 next to 1/M is smaller than 1/M.
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("side", [4, 5, 7, 10, 11])
def test_equal_keys_have_the_mark_whatever_their_rounding(side, dtype):
    keys = side * side
    weights = np.full((1, 1, keys), 1 / keys, dtype)
    figure = heatmaps(AttentionMap(weights, [0], (side, side), NonLocalSpec(channels=4)))
    assert triangles(figure) == [1 / keys]
    assert words(figure) == ["the query", f"1/{keys}, were all keys equal"]


def test_a_mark_beyond_the_scale_is_neither_drawn_nor_explained():
    figure = heatmaps(found_in((3, 5), [0]), largest=0.05)
    assert triangles(figure) == []
    assert words(figure) == ["the query"]


@pytest.mark.parametrize("pairwise", ["dot_product", "concatenation"])
def test_other_weights_have_no_such_mark(pairwise):
    figure = heatmaps(found_in((3, 5), [0], pairwise=pairwise))
    assert triangles(figure) == []
    assert words(figure) == ["the query"]
    assert figure.get_suptitle().endswith(": weights of 15 keys, score / number of keys")


# Weights that might be taken for a fault


def along(first, others, **options):
    """Return a map of a query whose first key has another weight than the others."""
    weights = np.full((1, 1, 12), others)
    weights[..., 0] = first
    return AttentionMap(weights, [7], (2, 2, 3), NonLocalSpec(channels=4, **options))


@pytest.mark.parametrize(
    ("first", "others", "pairwise", "remark"),
    [
        (1 / 12, 1 / 12, "gaussian", "all weights alike"),
        (0.0995, 0.1, "gaussian", "all weights alike"),
        (0.0985, 0.1, "gaussian", ""),
        (0.0, 0.0, "gaussian", "no valid key"),
        (0.0, 0.0, "dot_product", "all weights alike"),
        (-0.0995, -0.1, "dot_product", "all weights alike"),
        (-0.1, 0.1, "dot_product", ""),
    ],
)
def test_weights_that_show_nothing_are_said_to(first, others, pairwise, remark):
    found = along(first, others, pairwise=pairwise)
    label = panels(heatmaps(found))[0][0].get_ylabel()
    assert label == f"1: frame 1\nrow 0, column 1\n{remark}".strip()
    entry = words(arrows(found, np.zeros((2, 10, 15))))[0]
    share = f"{found.weights.sum():.0%} of its weight" if pairwise == "gaussian" else ""
    details = remark or share
    assert entry == "1: frame 1, row 0, column 1" + (f" ({details})" if details else "")


def test_only_the_keys_of_the_query_count_for_whether_weights_are_alike():
    weights = np.array([[[0.0, 0.0, 0.0, 0.25, 0.25, 0.25]]])
    found = AttentionMap(weights, [4], (2, 3), NonLocalSpec(channels=4, axes=(1,)))
    assert panels(heatmaps(found))[0][0].get_title() == "1: row 1, column 1\nall weights alike"


def test_weights_without_a_valid_key_are_not_said_to_sum_to_one():
    found = along(0.0, 0.0)
    titles = [figure.get_suptitle() for figure in (heatmaps(found), arrows(found, np.zeros((2, 10, 15))))]
    assert titles == ["embedded gaussian: weights of 12 keys, none of them valid"] * 2


# Positions that are no keys


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((5, 7), {"subsample": 2}),
        ((5, 7), {"subsample": (2, 1)}),
        ((5, 7), {"axes": (0,)}),
        ((5, 7), {"axes": (1,), "subsample": 3}),
        ((4, 3, 5), {"axes": "space", "subsample": 2}),
        ((4, 3, 5), {"axes": "time"}),
        ((4, 3, 5), {"axes": (0, 2)}),
        ((6, 3, 5), {"group_size": 3, "subsample": 2}),
    ],
)
def test_positions_that_are_no_key_of_the_query_are_hatched(sizes, options):
    found = found_in(sizes, [3, 34], **options)
    figure = heatmaps(found)
    shown = np.stack([hatched(axis, sizes[-2:]) for axis, _ in panels(figure)])
    np.testing.assert_array_equal(shown.reshape(2, *sizes), np.isnan(found.on_grid()[0]))
    assert "no key of the query" in words(figure)


def test_where_all_positions_are_keys_nothing_is_hatched():
    figure = heatmaps(found_in((4, 6), [0], subsample=2))
    assert [rectangles(axis) for axis, _ in panels(figure)] == [[]]
    assert "no key of the query" not in words(figure)


# Arrows


def lines(figure):
    """Return start, end, width, opacity and colour of the arrows, in the order of drawing."""
    notes = [text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None)]
    looks = [(note.arrow_patch.get_linewidth(), note.arrow_patch.get_alpha()) for note in notes]
    colours = [to_hex(note.arrow_patch.get_edgecolor()) for note in notes]
    return [(note.xyann, note.xy, *look, colour) for note, look, colour in zip(notes, looks, colours, strict=True)]


def test_arrows_lead_from_the_query_to_its_strongest_keys():
    weights = np.zeros((1, 1, 24))
    weights[0, 0, [0, 9, 23, 7]] = [0.5, 0.25, 0.125, 0.1]
    found = AttentionMap(weights, [5], (2, 3, 4), NonLocalSpec(channels=4))
    drawn_arrows = lines(arrows(found, np.zeros((2, 30, 40)), strongest=3))
    step = 4 * 1.06
    # The weakest is drawn first. Positions 0, 9 and 23 are (0, 0, 0), (0, 2, 1) and (1, 2, 3).
    assert [end for _, end, *_ in drawn_arrows] == [(step + 3, 2), (1, 2), (0, 0)]
    assert [start for start, *_ in drawn_arrows] == [(1, 1)] * 3
    _, _, widths, opacities, _ = zip(*drawn_arrows, strict=True)
    np.testing.assert_allclose(widths, [0.5 + 2.5 * 0.25, 0.5 + 2.5 * 0.5, 3], rtol=1e-12)
    np.testing.assert_allclose(opacities, [0.3 + 0.65 * 0.25, 0.3 + 0.65 * 0.5, 0.95], rtol=1e-12)


def test_frames_stand_side_by_side():
    frames = RNG.uniform(size=(2, 30, 40, 3))
    (axis,) = arrows(found_in((2, 3, 4), [5]), frames).axes
    np.testing.assert_allclose([image.get_array() for image in axis.images], 0.35 + 0.65 * (frames @ GREY), rtol=1e-12)
    step = 4 * 1.06
    assert extents(axis) == [
        (-0.5, 3.5, 2.5, -0.5),
        (step - 0.5, step + 3.5, 2.5, -0.5),
    ]
    assert [text.get_text().strip() for text in axis.texts if text.get_text().startswith("frame")] == [
        "frame 0",
        "frame 1",
    ]


def test_a_pooled_key_is_framed_in_every_frame_that_it_covers():
    weights = np.array([[[0.0, 0.0, 0.0, 1.0]]])
    found = AttentionMap(weights, [0], (5, 2, 4), NonLocalSpec(channels=4, subsample=2))
    figure = arrows(found, np.zeros((5, 20, 40)))
    step = 4 * 1.06
    np.testing.assert_allclose(rectangles(figure.axes[0]), [(2 * step + 1.5, -0.5, 2, 2), (3 * step + 1.5, -0.5, 2, 2)])
    ((_, end, *_),) = lines(figure)
    np.testing.assert_allclose(end, (2 * step + 2.5, 0.5))


def test_a_key_at_the_place_of_the_query_is_framed_without_an_arrow():
    weights = np.array([[[0.0, 1.0, 0.0, 0.0]]])
    found = AttentionMap(weights, [1], (2, 1, 2), NonLocalSpec(channels=4))
    figure = arrows(found, np.zeros((2, 10, 20)))
    assert lines(figure) == []
    assert rectangles(figure.axes[0]) == [(0.5, -0.5, 1, 1)]


def test_weights_of_zero_have_no_arrow():
    zero = AttentionMap(np.zeros((1, 1, 12)), [1], (2, 2, 3), NonLocalSpec(channels=4, pairwise="concatenation"))
    assert lines(arrows(zero, np.zeros((2, 10, 15)))) == []


def test_no_more_arrows_than_keys_are_drawn():
    found = found_in((2, 2, 3), [1], low=0.1, axes="space")
    assert len(lines(arrows(found, np.zeros((2, 10, 15)), strongest=50))) == 5


def test_each_query_has_its_colour():
    figure = arrows(found_in((2, 2, 3), [1, 8], low=0.1), np.zeros((2, 10, 15)), strongest=4)
    by_start = {start: colour for start, *_, colour in lines(figure)}
    assert list(by_start.values()) == ["#d55e00", "#0072b2"]
    assert words(figure)[0].startswith("1: frame 0, row 0, column 1 (")


def test_each_sign_has_its_colour():
    weights = np.array([[[0.0, 0.5, -1.0, 0.25]]])
    found = AttentionMap(weights, [0], (2, 1, 2), NonLocalSpec(channels=4, pairwise="dot_product"))
    figure = arrows(found, np.zeros((2, 10, 20)))
    assert [colour for *_, colour in lines(figure)] == ["#d55e00", "#d55e00", "#0072b2"]
    assert words(figure) == [
        "1: frame 0, row 0, column 0",
        "positive weight",
        "negative weight",
        "largest weight: 1",
        "smallest drawn weight: 0.25",
    ]


def test_the_legend_says_how_much_of_the_weight_is_drawn():
    weights = np.array([[[0.5, 0.25, 0.15, 0.1]]])
    found = AttentionMap(weights, [0], (2, 1, 2), NonLocalSpec(channels=4))
    figure = arrows(found, np.zeros((2, 10, 20)), strongest=2)
    assert words(figure) == [
        "1: frame 0, row 0, column 0 (75% of its weight)",
        "largest weight: 0.5",
        "smallest drawn weight: 0.25",
    ]
    assert (
        figure.get_suptitle() == "embedded gaussian: weights of 4 keys, which sum to 1; the 2 strongest of each query"
    )


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_the_title_and_the_legend_lie_within_the_figure(frames, queries):
    found = found_in((frames, 14, 14), range(140, 140 + queries))
    figure = arrows(found, np.zeros((frames, 28, 28)))
    figure.canvas.draw()
    texts = [figure.legends[0], figure._suptitle]  # noqa: SLF001 - matplotlib gives its text alone
    boxes = [text.get_window_extent() for text in texts]
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.width


# What is refused

SEQUENCE, IMAGE, VIDEO = ((7,), {}), ((5, 7), {}), ((3, 5, 7), {})


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        (
            (5, 7),
            {"image": np.zeros((3, 50, 70))},
            ValueError,
            r"`image` must have the shape \(H, W\) or \(H, W, 3\). Got",
        ),
        ((5, 7), {"image": np.zeros((50, 70, 4))}, ValueError, r"Got shape \(50, 70, 4\)"),
        ((5, 7), {"image": np.zeros(50)}, ValueError, r"Got shape \(50,\)"),
        ((5, 7), {"image": np.zeros((0, 70))}, ValueError, r"Got shape \(0, 70\)"),
        (
            (5, 7),
            {"image": np.zeros((70, 50))},
            ValueError,
            "`image` must have the proportions of the grid, 5 x 7 positions, height first. Got 70 x 50 pixels",
        ),
        (
            (5, 7),
            {"image": np.full((50, 70), 2.0)},
            ValueError,
            "`image` must hold bytes, or floats from 0 to 1. Got values from 2 to 2",
        ),
        (
            (5, 7),
            {"image": np.full((50, 70), np.nan)},
            ValueError,
            "`image` must hold bytes, or floats from 0 to 1. Got values from nan",
        ),
        (
            (5, 7),
            {"image": np.zeros((50, 70), int)},
            TypeError,
            "`image` must hold bytes, or floats from 0 to 1. Got int64",
        ),
        (
            (5, 7),
            {"frames": np.zeros((3, 50, 70))},
            ValueError,
            r"`frames` must be None for 2 spatial axes. Got shape \(3, 50",
        ),
        ((7,), {"image": np.zeros((50, 70))}, ValueError, "`image` must be None for 1 spatial axes"),
        ((3, 5, 7), {"image": np.zeros((50, 70))}, ValueError, "`image` must be None for 3 spatial axes"),
        (
            (3, 5, 7),
            {"frames": np.zeros((50, 70))},
            ValueError,
            r"`frames` must have the shape \(T, H, W\) or \(T, H, W, 3\)",
        ),
        ((3, 5, 7), {"frames": np.zeros((3, 3, 50, 70))}, ValueError, r"Got shape \(3, 3, 50, 70\)"),
        (
            (3, 5, 7),
            {"frames": np.zeros((4, 50, 70))},
            ValueError,
            "`frames` must be 3 frames, as the grid has, or a multiple. Got 4",
        ),
        ((5, 7), {"batch": 1}, ValueError, "`batch` must be the index of a sample, from 0 to 0. Got 1"),
        ((5, 7), {"batch": -1}, ValueError, "`batch` must be the index of a sample, from 0 to 0. Got -1"),
        ((5, 7), {"batch": 0.0}, TypeError, "`batch` must be the index of a sample"),
        ((5, 7), {"largest": 0}, ValueError, "`largest` must be a positive, finite float. Got 0"),
        ((5, 7), {"largest": "max"}, TypeError, "`largest` must be a positive, finite float. Got 'max'"),
        (
            (5, 7),
            {"cmap": "nosuch"},
            ValueError,
            "`cmap` must be the name of one of matplotlib's colour maps. Got 'nosuch'",
        ),
    ],
)
def test_heat_maps_refuse_what_does_not_fit(sizes, options, error, message):
    with pytest.raises(error, match=message):
        heatmaps(found_in(sizes, [0]), **options)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ((5, 7), {"frames": None}, ValueError, "`found` must be of a video, with 3 spatial axes. Got 2 spatial axes"),
        ((3, 5, 7), {"frames": None}, ValueError, "`frames` must be given. Got None"),
        ((3, 5, 7), {"frames": np.zeros((3, 70, 50))}, ValueError, "`frames` must have the proportions of the grid"),
        (
            (3, 5, 7),
            {"frames": np.zeros((3, 50, 70)), "strongest": 0},
            ValueError,
            "`strongest` must be a positive int",
        ),
        ((3, 5, 7), {"frames": np.zeros((3, 50, 70)), "batch": 2}, ValueError, "`batch` must be the index of a sample"),
    ],
)
def test_arrows_refuse_what_does_not_fit(sizes, options, error, message):
    with pytest.raises(error, match=message):
        arrows(found_in(sizes, [0]), **options)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("count", [0, 9])
def test_no_query_and_too_many_are_refused(count):
    with pytest.raises(
        ValueError, match=f"`found` must hold the weights of 1 to 8 queries to be drawn. Got {count} queries"
    ):
        heatmaps(found_in((3, 5), list(range(count))))


def test_another_thing_than_a_map_is_refused():
    with pytest.raises(TypeError, match=r"`found` must be an AttentionMap\. Got ndarray"):
        heatmaps(np.zeros((1, 1, 15)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    found = AttentionMap(np.full((1, 1, 15), value), [0], (3, 5), NonLocalSpec(channels=4))
    with pytest.raises(ValueError, match=r"`found` must hold finite weights\. Got"):
        heatmaps(found)


@pytest.mark.parametrize(
    ("sides", "fits"), [((112, 112), True), ((224, 224), True), ((225, 223), True), ((224, 300), False)]
)
def test_a_grid_may_be_rounded_from_the_sides_of_a_picture(sides, fits):
    # 14 x 14 positions of stride 16, whichever way the rest is rounded.
    found = found_in((14, 14), [0])
    if fits:
        assert heatmaps(found, np.zeros(sides)).axes
    else:
        with pytest.raises(ValueError, match="proportions"):
            heatmaps(found, np.zeros(sides))


# Matplotlib is an extra


@pytest.mark.parametrize("draw", [heatmaps, lambda found: arrows(found, np.zeros((2, 3, 5)))])
def test_where_matplotlib_is_missing_the_error_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib. Install it with `pip install 'nonlocal-core\[plots\]'`"):
        draw(found_in((2, 3, 5), [0]))


@pytest.mark.parametrize("statement", ["import nonlocal_core", "from nonlocal_core import plots"])
def test_matplotlib_is_imported_only_to_draw(statement):
    code = f"import sys; {statement}; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
