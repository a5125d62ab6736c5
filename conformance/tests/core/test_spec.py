"""The specification: what it accepts, what it refuses and in which words, and its one form."""

import copy
import enum
import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonlocal_conformance.strategies import specs_and_grids
from nonlocal_core import NonLocalSpec

AXES = "be 'all', 'space', 'time' or a tuple of distinct spatial axes from 0, 1, 2"
SCALE = "be None, 'inner', 'input' or a finite, non-zero float"
SUBSAMPLE = "be a positive int or one per axis"
EPSILON = "be a positive, finite float"
MOMENTUM = "be a float between 0 and 1"
FORMS = "be one of 'gaussian', 'embedded_gaussian', 'dot_product', 'concatenation'"
LAYERS = "name layers of this form, ('theta', 'phi', 'g', 'out')"
HUGE = 10**400


class Text(str):
    __slots__ = ()


class Form(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    DOT = "dot_product"


def difference(theta, phi):
    return -((theta[:, :, None] - phi[:, None]) ** 2).sum(-1)


def exactly(message):
    return f"^{re.escape(message)}$"


# Errors of single options

WRONG_VALUES = [
    ({"channels": 0}, "`channels` must be a positive int. Got 0."),
    ({"channels": -3}, "`channels` must be a positive int. Got -3."),
    ({"inner_channels": 0}, "`inner_channels` must be a positive int. Got 0."),
    ({"pairwise": "euclidean"}, f"`pairwise` must {FORMS}. Got 'euclidean'."),
    ({"pairwise": ""}, f"`pairwise` must {FORMS}. Got ''."),
    (
        {"pairwise": difference},
        "`normalize` must be 'softmax' or 'count' for a `pairwise` function. Got None.",
    ),
    (
        {"pairwise": difference, "normalize": "sum"},
        "`normalize` must be 'softmax' or 'count' for a `pairwise` function. Got 'sum'.",
    ),
    (
        {"normalize": "softmax"},
        "`normalize` must be None for the named form 'embedded_gaussian', which fixes it. Got 'softmax'.",
    ),
    ({"scale": 0}, f"`scale` must {SCALE}. Got 0.0."),
    ({"scale": -0.0}, f"`scale` must {SCALE}. Got -0.0."),
    ({"scale": math.nan}, f"`scale` must {SCALE}. Got nan."),
    ({"scale": -math.inf}, f"`scale` must {SCALE}. Got -inf."),
    ({"scale": HUGE}, f"`scale` must {SCALE}. Got inf."),
    ({"scale": np.float32("nan")}, f"`scale` must {SCALE}. Got nan."),
    ({"scale": "output"}, f"`scale` must {SCALE}. Got 'output'."),
    ({"subsample": 0}, f"`subsample` must {SUBSAMPLE}. Got 0."),
    ({"subsample": -2}, f"`subsample` must {SUBSAMPLE}. Got -2."),
    ({"subsample": ()}, f"`subsample` must {SUBSAMPLE}. Got ()."),
    ({"subsample": []}, f"`subsample` must {SUBSAMPLE}. Got ()."),
    ({"subsample": (2, 0)}, f"`subsample` must {SUBSAMPLE}. Got (2, 0)."),
    ({"subsample": (1, 1, 1, 1)}, f"`subsample` must {SUBSAMPLE}. Got (1, 1, 1, 1)."),
    (
        {"subsample_at": "output"},
        "`subsample_at` must be one of 'projection', 'input'. Got 'output'.",
    ),
    ({"subsample_at": None}, "`subsample_at` must be one of 'projection', 'input'. Got None."),
    ({"axes": "spacetime"}, f"`axes` must {AXES}. Got 'spacetime'."),
    ({"axes": ()}, f"`axes` must {AXES}. Got ()."),
    ({"axes": (0, 0)}, f"`axes` must {AXES}. Got (0, 0)."),
    ({"axes": [2, 1, 2]}, f"`axes` must {AXES}. Got (2, 1, 2)."),
    ({"axes": (3,)}, f"`axes` must {AXES}. Got (3,)."),
    ({"axes": (-1,)}, f"`axes` must {AXES}. Got -1."),
    ({"group_size": 0}, "`group_size` must be a positive int or None. Got 0."),
    ({"bias": {"concat": True}}, f"`bias` must {LAYERS}. Got ['concat']."),
    ({"bias": {"w": True, 3: False}}, f"`bias` must {LAYERS}. Got ['w', 3]."),
    (
        {"bias": {"theta": False}, "pairwise": "gaussian"},
        "`bias` must name layers of this form, ('g', 'out'). Got ['theta'].",
    ),
    ({"norm": "layer"}, "`norm` must be one of None, 'batch', 'affine'. Got 'layer'."),
    ({"norm_epsilon": 0}, f"`norm_epsilon` must {EPSILON}. Got 0.0."),
    ({"norm_epsilon": -1e-5}, f"`norm_epsilon` must {EPSILON}. Got -1e-05."),
    ({"norm_epsilon": math.inf}, f"`norm_epsilon` must {EPSILON}. Got inf."),
    ({"norm_epsilon": math.nan}, f"`norm_epsilon` must {EPSILON}. Got nan."),
    ({"norm_momentum": 1.5}, f"`norm_momentum` must {MOMENTUM}. Got 1.5."),
    ({"norm_momentum": -0.1}, f"`norm_momentum` must {MOMENTUM}. Got -0.1."),
    ({"norm_momentum": math.nan}, f"`norm_momentum` must {MOMENTUM}. Got nan."),
]

WRONG_TYPES = [
    ({"channels": True}, "`channels` must be a positive int. Got True of type bool."),
    ({"channels": np.True_}, "`channels` must be a positive int. Got np.True_ of type bool."),
    ({"channels": 8.0}, "`channels` must be a positive int. Got 8.0 of type float."),
    ({"channels": "8"}, "`channels` must be a positive int. Got '8' of type str."),
    ({"channels": None}, "`channels` must be a positive int. Got None of type NoneType."),
    ({"inner_channels": False}, "`inner_channels` must be a positive int. Got False of type bool."),
    ({"inner_channels": [4]}, "`inner_channels` must be a positive int. Got [4] of type list."),
    ({"pairwise": None}, "`pairwise` must be a string or a function. Got None of type NoneType."),
    ({"pairwise": b"gaussian"}, "`pairwise` must be a string or a function. Got b'gaussian' of type bytes."),
    ({"pairwise": []}, "`pairwise` must be a string or a function. Got [] of type list."),
    (
        {"pairwise": difference, "normalize": ["softmax"]},
        "`normalize` must be None, 'softmax' or 'count'. Got ['softmax'] of type list.",
    ),
    ({"normalize": True}, "`normalize` must be None, 'softmax' or 'count'. Got True of type bool."),
    ({"scale": True}, f"`scale` must {SCALE}. Got True of type bool."),
    ({"scale": 1j}, f"`scale` must {SCALE}. Got 1j of type complex."),
    ({"scale": [1.0]}, f"`scale` must {SCALE}. Got [1.0] of type list."),
    ({"subsample": True}, f"`subsample` must {SUBSAMPLE}. Got True of type bool."),
    ({"subsample": 2.0}, f"`subsample` must {SUBSAMPLE}. Got 2.0 of type float."),
    ({"subsample": "22"}, f"`subsample` must {SUBSAMPLE}. Got '22' of type str."),
    ({"subsample": b"\x02"}, f"`subsample` must {SUBSAMPLE}. Got b'\\x02' of type bytes."),
    ({"subsample": {2}}, f"`subsample` must {SUBSAMPLE}. Got {{2}} of type set."),
    ({"subsample": (2, True)}, f"`subsample` must {SUBSAMPLE}. Got True of type bool."),
    ({"subsample": (2, None)}, f"`subsample` must {SUBSAMPLE}. Got None of type NoneType."),
    ({"subsample": (2, (2,))}, f"`subsample` must {SUBSAMPLE}. Got (2,) of type tuple."),
    ({"subsample_at": 1}, "`subsample_at` must be one of 'projection', 'input'. Got 1 of type int."),
    ({"axes": None}, f"`axes` must {AXES}. Got None of type NoneType."),
    ({"axes": 1}, f"`axes` must {AXES}. Got 1 of type int."),
    ({"axes": {0}}, f"`axes` must {AXES}. Got {{0}} of type set."),
    ({"axes": b"\x00"}, f"`axes` must {AXES}. Got b'\\x00' of type bytes."),
    ({"axes": (True,)}, f"`axes` must {AXES}. Got True of type bool."),
    ({"axes": (False,)}, f"`axes` must {AXES}. Got False of type bool."),
    ({"axes": (1.0,)}, f"`axes` must {AXES}. Got 1.0 of type float."),
    ({"axes": (0, "1")}, f"`axes` must {AXES}. Got '1' of type str."),
    ({"group_size": True}, "`group_size` must be a positive int or None. Got True of type bool."),
    ({"group_size": (2,)}, "`group_size` must be a positive int or None. Got (2,) of type tuple."),
    ({"bias": 1}, "`bias` must be a bool. Got 1 of type int."),
    ({"bias": None}, "`bias` must be a bool. Got None of type NoneType."),
    ({"bias": "g"}, "`bias` must be a bool or a mapping from a layer to a bool. Got 'g' of type str."),
    ({"bias": {"g": 1}}, "`bias` must be a bool. Got 1 of type int."),
    ({"bias": {"g": None}}, "`bias` must be a bool. Got None of type NoneType."),
    ({"norm": True}, "`norm` must be one of None, 'batch', 'affine'. Got True of type bool."),
    ({"norm": []}, "`norm` must be one of None, 'batch', 'affine'. Got [] of type list."),
    ({"norm_epsilon": True}, f"`norm_epsilon` must {EPSILON}. Got True of type bool."),
    ({"norm_epsilon": "1e-5"}, f"`norm_epsilon` must {EPSILON}. Got '1e-5' of type str."),
    ({"norm_momentum": None}, f"`norm_momentum` must {MOMENTUM}. Got None of type NoneType."),
    ({"residual": 1}, "`residual` must be a bool. Got 1 of type int."),
    ({"residual": None}, "`residual` must be a bool. Got None of type NoneType."),
    ({"zero_init": 0.0}, "`zero_init` must be a bool. Got 0.0 of type float."),
    ({"zero_init": []}, "`zero_init` must be a bool. Got [] of type list."),
]

CONTRADICTIONS = [
    ({"group_size": 2, "axes": "space"}, "`group_size` must be None unless `axes` is 'all'. Got 2."),
    ({"group_size": 2, "axes": (0, 1, 2)}, "`group_size` must be None unless `axes` is 'all'. Got 2."),
    (
        {"group_size": 2, "subsample": (2, 2)},
        "`subsample` must have one entry for each of the 3 axes of a video. Got (2, 2).",
    ),
    (
        {"axes": "time", "subsample": (2,)},
        "`subsample` must have one entry for each of the 3 axes of a video. Got (2,).",
    ),
    (
        {"axes": "space", "subsample": (2, 2)},
        "`subsample` must have one entry for each of the 3 axes of a video. Got (2, 2).",
    ),
    (
        {"axes": (0, 1), "subsample": (2,)},
        "`axes` must be below the 1 axes that `subsample` names. Got (0, 1).",
    ),
    (
        {"axes": "space", "subsample": (2, 2, 2)},
        "`subsample` must be 1 on every axis that is not in `axes` ('space'). Got (2, 2, 2).",
    ),
    (
        {"axes": (1,), "subsample": (2, 2)},
        "`subsample` must be 1 on every axis that is not in `axes` ((1,)). Got (2, 2).",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG_VALUES + CONTRADICTIONS)
def test_a_wrong_value_is_a_value_error_in_these_words(options, message):
    with pytest.raises(ValueError, match=exactly(message)):
        NonLocalSpec(**{"channels": 8, **options})


@pytest.mark.parametrize(("options", "message"), WRONG_TYPES)
def test_a_wrong_type_is_a_type_error_in_these_words(options, message):
    with pytest.raises(TypeError, match=exactly(message)):
        NonLocalSpec(**{"channels": 8, **options})


def test_every_option_is_among_the_errors():
    tested = {name for options, _ in WRONG_VALUES + WRONG_TYPES for name in options}
    assert tested == {field.name for field in NonLocalSpec.__dataclass_fields__.values()}


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(
        TypeError, match=r"^`subsamples` must be an option of NonLocalSpec\. .* nearest is `subsample`\.$"
    ):
        NonLocalSpec(channels=8, subsamples=2)


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional argument"):
        NonLocalSpec(8)


def test_channels_have_no_default():
    with pytest.raises(TypeError, match="'channels'"):
        NonLocalSpec()


def test_a_spec_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field 'channels'"):
        NonLocalSpec(channels=8).channels = 4


def test_the_biases_cannot_be_changed_in_place():
    with pytest.raises(TypeError, match="does not support item assignment"):
        NonLocalSpec(channels=8).bias["g"] = False


def test_the_biases_look_like_the_dict_that_makes_them_and_differ_in_their_hash():
    bias = NonLocalSpec(channels=8, bias={"g": False}).bias
    assert repr(bias) == "{'theta': True, 'phi': True, 'g': False, 'out': True}"
    assert hash(bias) != hash(NonLocalSpec(channels=8).bias)


# One form

SAME = [
    ({}, {"inner_channels": 4}),
    ({"channels": np.int64(8)}, {}),
    ({"channels": np.array(8)}, {}),
    ({"inner_channels": np.uint8(3)}, {"inner_channels": 3}),
    ({"pairwise": Text("dot_product")}, {"pairwise": "dot_product"}),
    ({"pairwise": np.str_("dot_product")}, {"pairwise": "dot_product"}),
    ({"pairwise": Form.DOT}, {"pairwise": "dot_product"}),
    (
        {"pairwise": difference, "normalize": Text("count")},
        {"pairwise": difference, "normalize": "count"},
    ),
    ({"scale": 2}, {"scale": 2.0}),
    ({"scale": np.float32(0.5)}, {"scale": 0.5}),
    ({"scale": Fraction(1, 4)}, {"scale": 0.25}),
    ({"scale": np.str_("inner")}, {"scale": "inner"}),
    ({"subsample": [1, 2]}, {"subsample": (1, 2)}),
    ({"subsample": range(1, 3)}, {"subsample": (1, 2)}),
    ({"subsample": (np.int32(1), np.int64(2))}, {"subsample": (1, 2)}),
    ({"subsample": np.int64(2)}, {"subsample": 2}),
    ({"subsample_at": np.str_("input")}, {"subsample_at": "input"}),
    ({"axes": [2, 0]}, {"axes": (0, 2)}),
    ({"axes": (np.int64(1), 0)}, {"axes": (0, 1)}),
    ({"axes": (np.int64(0),)}, {"axes": (0,)}),
    ({"axes": Text("time")}, {"axes": "time"}),
    ({"group_size": np.int16(4)}, {"group_size": 4}),
    ({"bias": {}}, {"bias": True}),
    ({"bias": np.False_}, {"bias": False}),
    ({"bias": {"out": False, "g": np.True_}}, {"bias": {"g": True, "out": False}}),
    ({"bias": dict.fromkeys(("theta", "phi", "g", "out"), False)}, {"bias": False}),
    ({"bias": True, "pairwise": "gaussian"}, {"bias": {"g": True, "out": True}, "pairwise": "gaussian"}),
    (
        {"pairwise": "concatenation"},
        {
            "pairwise": "concatenation",
            "bias": {"theta": True, "phi": True, "g": True, "concat": False, "out": True},
        },
    ),
    (
        {"pairwise": "concatenation", "bias": {"g": False}},
        {"pairwise": "concatenation", "bias": {"g": False, "concat": False}},
    ),
    ({"norm": np.str_("batch")}, {"norm": "batch"}),
    ({"norm_epsilon": np.float64(1e-3)}, {"norm_epsilon": 1e-3}),
    ({"norm_momentum": 1}, {"norm_momentum": 1.0}),
    ({"residual": np.True_}, {}),
    ({"zero_init": np.False_}, {"zero_init": False}),
]


@pytest.mark.parametrize(("given_options", "plain_options"), SAME)
def test_equal_meaning_gives_one_form(given_options, plain_options):
    spec, plain = (NonLocalSpec(**{"channels": 8, **options}) for options in (given_options, plain_options))
    assert spec == plain
    assert hash(spec) == hash(plain)
    # The repr shows a NumPy scalar, and an enumeration, where equality does not.
    assert repr(spec) == repr(plain)
    fields = [(type(getattr(spec, name)), type(getattr(plain, name))) for name in spec.__dataclass_fields__]
    assert all(one is other for one, other in fields)


DIFFERENT = [
    {},
    {"channels": 16},
    {"inner_channels": 5},
    {"pairwise": "gaussian"},
    {"pairwise": "dot_product"},
    {"pairwise": "concatenation"},
    {"pairwise": "concatenation", "bias": {"concat": True}},
    {"pairwise": difference, "normalize": "softmax"},
    {"pairwise": difference, "normalize": "count"},
    {"scale": "inner"},
    {"scale": "input"},
    {"scale": -1},
    {"subsample": 2},
    {"subsample": (2, 2)},
    {"subsample_at": "input"},
    {"axes": "space"},
    {"axes": (0, 1)},
    {"group_size": 2},
    {"bias": False},
    {"bias": {"theta": False}},
    {"bias": {"phi": False}},
    {"norm": "batch"},
    {"norm": "affine"},
    {"norm_epsilon": 1e-3},
    {"norm_momentum": 0.2},
    {"residual": False},
    {"zero_init": False},
]


def test_different_options_give_different_specs():
    assert len({NonLocalSpec(**{"channels": 8, **options}) for options in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize(("channels", "inner"), [(1, 1), (2, 1), (3, 1), (7, 3), (1024, 512)])
def test_the_inner_channels_are_half_and_at_least_one(channels, inner):
    assert NonLocalSpec(channels=channels).inner_channels == inner


# Derived values


@pytest.mark.parametrize(
    ("pairwise", "layers", "has_embedding", "is_softmax"),
    [
        ("gaussian", ("g", "out"), False, True),
        ("embedded_gaussian", ("theta", "phi", "g", "out"), True, True),
        ("dot_product", ("theta", "phi", "g", "out"), True, False),
        ("concatenation", ("theta", "phi", "g", "concat", "out"), True, False),
    ],
)
def test_a_named_form_fixes_its_layers_and_its_weights(pairwise, layers, has_embedding, is_softmax):
    spec = NonLocalSpec(channels=8, pairwise=pairwise)
    assert (spec.layers, spec.has_embedding, spec.is_softmax) == (layers, has_embedding, is_softmax)


@pytest.mark.parametrize(("normalize", "is_softmax"), [("softmax", True), ("count", False)])
def test_a_function_has_an_embedding_and_its_own_weights(normalize, is_softmax):
    spec = NonLocalSpec(channels=8, pairwise=difference, normalize=normalize)
    assert (spec.layers, spec.normalize, spec.is_softmax) == (("theta", "phi", "g", "out"), normalize, is_softmax)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [(None, 1.0), ("inner", 16**-0.5), ("input", 64**-0.5), (-2, -2.0), (5e-324, 5e-324)],
)
def test_the_scale_factor_is_the_number_that_the_scale_names(scale, factor):
    assert NonLocalSpec(channels=64, inner_channels=16, scale=scale).scale_factor == factor


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, None),
        ({"subsample": 2}, None),
        ({"subsample": (2,)}, 1),
        ({"subsample": (2, 1)}, 2),
        ({"subsample": (1, 2, 2)}, 3),
        ({"axes": "space"}, 3),
        ({"axes": "time", "subsample": 2}, 3),
        ({"group_size": 4}, 3),
    ],
)
def test_options_that_speak_of_a_video_or_of_each_axis_require_a_rank(options, rank):
    assert NonLocalSpec(channels=8, **options).rank == rank


@pytest.mark.parametrize("layer", ["theta", "phi", "g", "out"])
def test_a_bias_is_dropped_for_the_layer_that_is_named(layer):
    spec = NonLocalSpec(channels=8, bias={layer: False})
    assert {name for name in spec.layers if not spec.bias[name]} == {layer}


# Copies


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({}, {"scale": "inner"}, {"scale": "inner"}),
        ({}, {"channels": 32}, {"channels": 32, "inner_channels": 16}),
        ({"inner_channels": 3}, {"channels": 32}, {"channels": 32, "inner_channels": 3}),
        ({}, {"channels": 32, "inner_channels": 4}, {"channels": 32, "inner_channels": 4}),
        ({"bias": False}, {"pairwise": "concatenation"}, {"pairwise": "concatenation", "bias": False}),
        (
            {"pairwise": "gaussian", "bias": False},
            {"pairwise": "dot_product"},
            {"pairwise": "dot_product", "bias": False},
        ),
        (
            {"bias": {"theta": False, "out": False}},
            {"pairwise": "gaussian"},
            {"pairwise": "gaussian", "bias": {"out": False}},
        ),
        (
            {"pairwise": "concatenation", "bias": {"concat": True, "g": False}},
            {"pairwise": "dot_product"},
            {"pairwise": "dot_product", "bias": {"g": False}},
        ),
        (
            {"pairwise": "concatenation", "bias": {"concat": True, "g": False}},
            {"pairwise": "concatenation"},
            {"pairwise": "concatenation", "bias": {"concat": True, "g": False}},
        ),
        (
            {"pairwise": "concatenation", "bias": {"concat": True, "g": False}},
            {"pairwise": "gaussian"},
            {"pairwise": "gaussian", "bias": {"g": False}},
        ),
        (
            {"pairwise": "concatenation", "bias": {"concat": True, "g": False}},
            {"pairwise": difference, "normalize": "count"},
            {"pairwise": difference, "normalize": "count", "bias": {"g": False}},
        ),
        (
            {"pairwise": "gaussian", "bias": {"g": False}},
            {"pairwise": difference, "normalize": "softmax"},
            {"pairwise": difference, "normalize": "softmax", "bias": {"g": False}},
        ),
        (
            {"bias": False},
            {"pairwise": "gaussian", "bias": {"g": False}},
            {"pairwise": "gaussian", "bias": {"g": False}},
        ),
    ],
)
def test_replace_changes_what_it_names_and_what_follows_from_it(options, changes, expected):
    spec = NonLocalSpec(**{"channels": 8, **options})
    before = repr(spec)
    assert spec.replace(**changes) == NonLocalSpec(**{"channels": 8, **expected})
    assert repr(spec) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"channels": 0}, ValueError, "`channels` must be a positive int. Got 0."),
        ({"channels": "8"}, TypeError, "`channels` must be a positive int. Got '8' of type str."),
        ({"pairwise": []}, TypeError, "`pairwise` must be a string or a function. Got [] of type list."),
        ({"pairwise": "dot"}, ValueError, f"`pairwise` must {FORMS}. Got 'dot'."),
        ({"bias": {"concat": True}}, ValueError, f"`bias` must {LAYERS}. Got ['concat']."),
    ],
)
def test_replace_validates(changes, error, message):
    with pytest.raises(error, match=exactly(message)):
        NonLocalSpec(channels=8).replace(**changes)


def test_replace_refuses_an_unknown_option():
    with pytest.raises(TypeError, match=r"^`stride` must be an option of NonLocalSpec\. Got an unknown one\.$"):
        NonLocalSpec(channels=8).replace(stride=2)


# Random specs


@settings(deadline=None, max_examples=200)
@given(specs_and_grids())
def test_json_reads_back_to_an_equal_spec(drawn):
    spec, _ = drawn
    text = spec.to_json()
    read = NonLocalSpec.from_json(text)
    assert (read, hash(read), repr(read), read.to_json()) == (spec, hash(spec), repr(spec), text)


@settings(deadline=None)
@given(specs_and_grids())
def test_the_options_that_differ_from_their_defaults_make_the_spec_again(drawn):
    spec, _ = drawn
    changed = spec.changed_options()
    assert NonLocalSpec(channels=spec.channels, **changed) == spec


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {}),
        ({"inner_channels": 4, "scale": None, "bias": True}, {}),
        ({"inner_channels": 3, "subsample": [2, 2]}, {"inner_channels": 3, "subsample": (2, 2)}),
        ({"bias": {"g": False}, "norm_epsilon": 1e-3}, {"bias": {"g": False}, "norm_epsilon": 1e-3}),
        ({"pairwise": "gaussian", "bias": False}, {"pairwise": "gaussian", "bias": {"g": False, "out": False}}),
        (
            {"pairwise": "concatenation", "bias": {"concat": True}},
            {"pairwise": "concatenation", "bias": {"concat": True}},
        ),
    ],
)
def test_only_options_that_differ_from_their_defaults_are_named(options, changed):
    assert NonLocalSpec(channels=8, **options).changed_options() == changed


@settings(deadline=None)
@given(specs_and_grids())
def test_a_copy_and_a_pickle_are_equal(drawn):
    spec, _ = drawn
    copies = (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), spec.replace())  # noqa: S301
    assert {*copies, spec} == {spec}


@settings(deadline=None)
@given(specs_and_grids(), st.integers(1, 3), st.booleans())
def test_an_input_with_unknown_sizes_is_accepted_where_the_known_one_is(drawn, batch, masked):
    spec, sizes = drawn
    shape = (batch, *sizes, spec.channels)
    unknown = itertools.product(*[(size, None) for size in shape])
    for some in [shape, (None,) * len(shape), *itertools.islice(unknown, 12)]:
        spec.check_input(some, mask_shape=some[:-1] if masked else None)


@settings(deadline=None, max_examples=200)
@given(specs_and_grids())
def test_sets_are_those_of_a_search_over_all_positions(drawn):
    check_sets(*drawn)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"axes": "space", "subsample": (1, 2, 3)}, (2, 5, 7)),
        ({"axes": "time", "subsample": (3, 1, 1)}, (7, 2, 5)),
        ({"axes": "time", "subsample": 2}, (5, 2, 3)),
        ({"axes": (1,), "subsample": (1, 3)}, (2, 7)),
        ({"axes": (0, 2), "subsample": (3, 1, 2)}, (4, 3, 5)),
        ({"group_size": 3, "subsample": (2, 1, 3)}, (6, 2, 5)),
        ({"group_size": 2}, (6, 1, 3)),
        ({"subsample": (2, 3)}, (5, 7)),
    ],
)
def test_sets_of_unequal_axes_are_those_of_the_search(options, sizes):
    check_sets(NonLocalSpec(channels=8, **options), sizes)


def test_sets_along_columns_are_columns():
    sets = NonLocalSpec(channels=8, axes=(0,), subsample=2).sets((5, 3))
    cut = np.arange(15).reshape(1, 5, 3, 1).transpose(sets.cut_axes).reshape(sets.count, sets.queries)
    assert cut.tolist() == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]
    assert (sets.count, sets.queries, sets.keys) == (3, 5, 2)


def check_sets(spec, sizes):
    positions, keys = search(spec, sizes)
    sets = spec.sets(sizes)
    numbers = np.arange(math.prod(sizes)).reshape(1, *sets.grid, 1).transpose(sets.cut_axes)
    cut = numbers.reshape(sets.count, sets.queries)
    assert cut.tolist() == positions
    assert (sets.keys, math.prod(sets.key_sizes)) == (keys, keys)
    assert numbers.transpose(sets.uncut_axes).ravel().tolist() == list(range(math.prod(sizes)))


def search(spec, sizes):
    """Return the positions of each set in row-major order, and how many keys each set has."""
    positions, windows = defaultdict(list), defaultdict(set)
    inner = {"all": (0, 1, 2), "space": (1, 2), "time": (0,)}.get(spec.axes, spec.axes)
    length = {
        axis: spec.subsample[axis] if isinstance(spec.subsample, tuple) else spec.subsample or 1
        for axis in range(len(sizes))
    }
    frames = spec.group_size or sizes[0]
    for number, at in enumerate(itertools.product(*map(range, sizes))):
        group = at[0] // frames
        label = (group, *(at[axis] for axis in range(len(at)) if axis not in inner))
        positions[label].append(number)
        local = (at[0] % frames, *at[1:])
        extent = (frames, *sizes[1:])
        window = tuple(local[axis] // length[axis] for axis in range(len(at)) if axis in inner)
        whole = all(
            local[axis] // length[axis] < extent[axis] // length[axis] for axis in range(len(at)) if axis in inner
        )
        windows[label] |= {window} if whole else set()
    counts = {len(found) for found in windows.values()}
    (count,) = counts
    return [positions[label] for label in sorted(positions)], count


# JSON


def test_json_holds_every_option_by_name():
    spec = NonLocalSpec(channels=8, subsample=[1, 2, 2], bias={"g": False}, norm="batch")
    assert json.loads(spec.to_json()) == {
        "channels": 8,
        "inner_channels": 4,
        "pairwise": "embedded_gaussian",
        "normalize": None,
        "scale": None,
        "subsample": [1, 2, 2],
        "subsample_at": "projection",
        "axes": "all",
        "group_size": None,
        "bias": {"theta": True, "phi": True, "g": False, "out": True},
        "norm": "batch",
        "norm_epsilon": 1e-5,
        "norm_momentum": 0.1,
        "residual": True,
        "zero_init": True,
    }


def test_json_refuses_a_function_by_name():
    spec = NonLocalSpec(channels=8, pairwise=difference, normalize="count")
    message = f"`pairwise` must be one of the named forms to be written as JSON. Got {difference}."
    with pytest.raises(ValueError, match=exactly(message)):
        spec.to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^`text` must be JSON\. Expecting value"),
        ("{'channels': 8}", r"^`text` must be JSON\. Expecting property name"),
        (b"\xff", r"^`text` must be JSON\. "),
        (None, r"^`text` must be JSON\. the JSON object must be str"),
        pytest.param("[" * 10**6, r"^`text` must be JSON\. ", id="deep"),
        pytest.param("1" * 5000, r"^`text` must be JSON\. Exceeds the limit", id="long"),
        ('{"channels": 8, "bias": {"g": true, "g": true}}', r"^`text` must be JSON\. The key 'g' stands twice"),
        ('{"channels": 8, "channels": 8}', r"^`text` must be JSON\. The key 'channels' stands twice in one object$"),
        ("[8]", exactly("`text` must be a JSON object. Got [8].")),
        ("null", exactly("`text` must be a JSON object. Got null.")),
        ("{}", r"^`text` must have 'channels' and no options beside \[.*\]. Got \[\]\.$"),
        ('{"norm": null}', r"^`text` must have 'channels' and no options beside .* Got \['norm'\]\.$"),
        ('{"channels": 8, "heads": 2}', r" no options beside .* Got \['channels', 'heads'\]\.$"),
        ('{"channels": 0}', exactly("`channels` must be a positive int. Got 0.")),
        ('{"channels": 8, "scale": NaN}', exactly(f"`scale` must {SCALE}. Got nan.")),
        ('{"channels": 8, "norm_epsilon": 1e999}', exactly(f"`norm_epsilon` must {EPSILON}. Got inf.")),
    ],
)
def test_wrong_json_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        NonLocalSpec.from_json(text)


def test_json_with_a_wrong_type_is_a_type_error():
    message = "`channels` must be a positive int. Got 8.0 of type float."
    with pytest.raises(TypeError, match=exactly(message)):
        NonLocalSpec.from_json('{"channels": 8.0}')


# Inputs

FITTING = [
    ({}, {"shape": (2, 5, 4)}),
    ({}, {"shape": (2, 5, 6, 4)}),
    ({}, {"shape": (2, 3, 5, 6, 4)}),
    ({}, {"shape": (0, 5, 4)}),
    ({}, {"shape": [np.int64(2), np.int64(5), np.int64(4)]}),
    ({}, {"shape": (2, 5, 4), "dtype": "bfloat16"}),
    ({}, {"shape": (2, 5, 4), "mask_shape": (2, 5)}),
    ({}, {"shape": (None, 5, 4), "mask_shape": (7, None)}),
    ({"subsample": 5}, {"shape": (2, 5, 5, 4)}),
    ({"subsample": (1, 2, 2)}, {"shape": (2, 1, 3, 2, 4)}),
    ({"axes": "time", "subsample": 3}, {"shape": (2, 3, 1, 1, 4)}),
    ({"axes": (1,), "subsample": 3}, {"shape": (2, 1, 3, 4)}),
    ({"group_size": 2}, {"shape": (2, 6, 1, 1, 4)}),
    ({"norm": "batch"}, {"shape": (1, 1, 4)}),
    ({"norm": "batch"}, {"shape": (1, 2, 4), "training": True}),
    ({"norm": "batch"}, {"shape": (2, 1, 4), "training": True}),
    ({"norm": "batch"}, {"shape": (None, 1, 4), "training": True}),
    ({"norm": "batch"}, {"shape": (1, None, 4), "training": True}),
    ({"norm": "batch"}, {"shape": (1, 1, None, 4), "training": True}),
    ({"norm": "affine"}, {"shape": (1, 1, 4), "training": True}),
    ({}, {"shape": (1, 1, 4), "training": True}),
]


@pytest.mark.parametrize(("options", "arguments"), FITTING)
def test_a_fitting_input_is_accepted(options, arguments):
    assert NonLocalSpec(channels=4, **options).check_input(**arguments) is None


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {},
            {"shape": (2, 4)},
            "`x` must have 1, 2 or 3 spatial axes beside batch and channels. Got 0 spatial axes.",
        ),
        (
            {},
            {"shape": ()},
            "`x` must have 1, 2 or 3 spatial axes beside batch and channels. Got shape ().",
        ),
        (
            {},
            {"shape": (2, 3, 3, 3, 3, 4)},
            "`x` must have 1, 2 or 3 spatial axes beside batch and channels. Got 4 spatial axes.",
        ),
        (
            {"axes": "space"},
            {"shape": (2, 3, 3, 4)},
            "`x` must have 3 spatial axes, as the options require. Got 2 spatial axes.",
        ),
        (
            {"subsample": (2,)},
            {"shape": (2, 3, 3, 4)},
            "`x` must have 1 spatial axes, as the options require. Got 2 spatial axes.",
        ),
        (
            {"axes": (0, 2)},
            {"shape": (2, 3, 3, 4)},
            "`axes` must be below the number of spatial axes, 2. Got (0, 2).",
        ),
        ({}, {"shape": (2, 3, 5)}, "`x` must have 4 channels. Got 5 channels."),
        ({}, {"shape": (None, None, 5)}, "`x` must have 4 channels. Got 5 channels."),
        (
            {},
            {"shape": (2, 3, 0, 4)},
            "`x` must have at least one position on every spatial axis. Got size 0 on axis 1.",
        ),
        (
            {"group_size": 4},
            {"shape": (2, 6, 3, 3, 4)},
            "`group_size` must divide the number of frames. Got 4 for 6 frames.",
        ),
        (
            {"subsample": 2},
            {"shape": (2, 4, 1, 4)},
            "`subsample` must leave at least one window on spatial axis 1. Got size 1 and window 2.",
        ),
        (
            {"subsample": (1, 2, 3)},
            {"shape": (None, None, None, 2, 4)},
            "`subsample` must leave at least one window on spatial axis 2. Got size 2 and window 3.",
        ),
        (
            {"subsample": (3, 1, 1), "group_size": 2},
            {"shape": (2, 6, 3, 3, 4)},
            "`subsample` must leave at least one window on spatial axis 0. Got size 2 and window 3.",
        ),
        (
            {"subsample": 3, "axes": "time"},
            {"shape": (2, 2, 3, 3, 4)},
            "`subsample` must leave at least one window on spatial axis 0. Got size 2 and window 3.",
        ),
        (
            {},
            {"shape": (2, 3, 4), "mask_shape": (2, 3, 4)},
            "`key_mask` must have shape (2, 3). Got shape (2, 3, 4).",
        ),
        (
            {},
            {"shape": (2, 3, 4), "mask_shape": (3, 2)},
            "`key_mask` must have shape (2, 3). Got shape (3, 2).",
        ),
        (
            {},
            {"shape": (None, 3, 4), "mask_shape": (2, 5)},
            "`key_mask` must have shape (None, 3). Got shape (2, 5).",
        ),
        (
            {"norm": "batch"},
            {"shape": (1, 1, 1, 4), "training": True},
            "`x` must have more than one value per channel in training with norm 'batch'. Got 1.",
        ),
        (
            {"norm": "batch"},
            {"shape": (0, 7, 4), "training": True},
            "`x` must have more than one value per channel in training with norm 'batch'. Got 0.",
        ),
        (
            {"norm": "batch"},
            {"shape": (1, 1, None), "training": True},
            "`x` must have more than one value per channel in training with norm 'batch'. Got 1.",
        ),
    ],
)
def test_an_input_of_a_wrong_shape_is_a_value_error_in_these_words(options, arguments, message):
    with pytest.raises(ValueError, match=exactly(message)):
        NonLocalSpec(channels=4, **options).check_input(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int64"}, "`x` must have a floating-point dtype. Got int64."),
        ({"dtype": "complex64"}, "`x` must have a floating-point dtype. Got complex64."),
        ({"dtype": "bool"}, "`x` must have a floating-point dtype. Got bool."),
        (
            {"mask_shape": (2, 3), "mask_dtype": "float32"},
            "`key_mask` must be boolean. Got float32.",
        ),
        ({"mask_shape": (2, 3), "mask_dtype": "uint8"}, "`key_mask` must be boolean. Got uint8."),
    ],
)
def test_an_input_of_a_wrong_dtype_is_a_type_error_in_these_words(arguments, message):
    with pytest.raises(TypeError, match=exactly(message)):
        NonLocalSpec(channels=4).check_input((2, 3, 4), **arguments)
