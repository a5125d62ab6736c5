"""Presets: what each public implementation computes, as a literal table, and what is refused."""

import itertools
import re

import numpy as np
import pytest

from nonlocal_core import NonLocalSpec, init_params, nonlocal_block, param_shapes
from nonlocal_core.spec.presets import PRESETS

E, G, D, C = "embedded_gaussian", "gaussian", "dot_product", "concatenation"
OFFICIAL = 1.0000001e-5
PAPER = 1e-5

# C is 24. Columns: name, rank, form, norm; C', scale, window, place of pooling, layers without a bias,
# whether the concatenation has one, epsilon, whether a new block adds nothing.
FACTS = [
    ("official", 3, E, "batch", 12, "inner", (1, 2, 2), "input", "", False, OFFICIAL, True),
    ("official", 3, D, "batch", 12, None, (1, 2, 2), "input", "", False, OFFICIAL, True),
    ("official", 3, E, "affine", 12, "inner", (1, 2, 2), "input", "", False, OFFICIAL, True),
    ("official", 3, D, None, 12, None, (1, 2, 2), "input", "", False, OFFICIAL, True),
    ("official_affine", 3, E, None, 12, "inner", (1, 2, 2), "input", "", False, OFFICIAL, True),
    ("official_affine", 3, D, None, 12, None, (1, 2, 2), "input", "", False, OFFICIAL, True),
    ("slowfast", 3, E, "batch", 12, "inner", (1, 2, 2), "input", "", False, PAPER, False),
    ("slowfast", 3, D, "batch", 12, None, (1, 2, 2), "input", "", False, PAPER, False),
    ("pytorchvideo", 3, E, "batch", 12, "inner", None, "input", "", False, PAPER, False),
    ("pytorchvideo", 3, D, "batch", 12, None, None, "input", "", False, PAPER, False),
    ("pytorchvideo", 3, E, None, 12, "inner", None, "input", "", False, PAPER, False),
    ("mmcv", 1, E, None, 12, "inner", None, "projection", "", False, PAPER, True),
    ("mmcv", 2, G, None, 12, None, None, "projection", "", False, PAPER, True),
    ("mmcv", 3, D, None, 12, None, None, "projection", "", False, PAPER, True),
    ("mmcv", 3, C, None, 12, None, None, "projection", "", False, PAPER, True),
    ("mmcv", 3, E, "batch", 12, "inner", None, "projection", "out", False, PAPER, True),
    ("mmcv", 2, G, "batch", 12, None, None, "projection", "out", False, PAPER, True),
    ("mmcv", 2, C, "batch", 12, None, None, "projection", "out", False, PAPER, True),
    ("alexhex7", 1, E, "batch", 12, None, (2,), "projection", "", False, PAPER, True),
    ("alexhex7", 2, G, "batch", 12, None, (2, 2), "projection", "", False, PAPER, True),
    ("alexhex7", 3, D, "batch", 12, None, (1, 2, 2), "projection", "", False, PAPER, True),
    ("alexhex7", 3, C, None, 12, None, (1, 2, 2), "projection", "", False, PAPER, True),
    ("tea1528", 1, E, "batch", 12, None, None, "projection", "", False, PAPER, True),
    ("tea1528", 2, G, "batch", 12, None, None, "projection", "", False, PAPER, True),
    ("tea1528", 3, D, None, 12, None, None, "projection", "", False, PAPER, True),
    ("tea1528", 3, C, "batch", 12, None, None, "projection", "", True, PAPER, True),
    ("timm", 2, E, "batch", 8, "input", None, "projection", "", False, PAPER, True),
    ("gluon", 2, E, "batch", 12, "inner", None, "projection", "", False, PAPER, True),
    ("gluon", 3, E, None, 12, "inner", None, "projection", "", False, PAPER, True),
    ("mmdet2019", 2, E, None, 12, 12**0.5, None, "projection", "", False, PAPER, True),
    ("mmdet2019", 2, D, None, 12, None, None, "projection", "", False, PAPER, True),
    ("mmdet2019", 2, E, "batch", 12, 12**0.5, None, "projection", "out", False, PAPER, True),
    ("keras_nonlocal", 1, E, None, 12, None, (2,), "projection", "theta phi g out", False, PAPER, False),
    ("keras_nonlocal", 2, E, None, 12, None, (1, 2), "projection", "theta phi g out", False, PAPER, False),
    ("keras_nonlocal", 3, E, None, 12, None, (1, 1, 2), "projection", "theta phi g out", False, PAPER, False),
    ("keras_nonlocal", 2, D, None, 12, None, None, "projection", "theta phi g out", False, PAPER, False),
    ("keras_nonlocal", 3, G, None, 12, None, None, "projection", "g out", False, PAPER, False),
]

# Name, its forms and its norms with the default first, its ranks.
OFFERED = [
    ("official", (E, D), ("batch", None, "affine"), (3,)),
    ("official_affine", (E, D), (None, "affine", "batch"), (3,)),
    ("slowfast", (E, D), ("batch",), (3,)),
    ("pytorchvideo", (E, D), ("batch", None, "affine"), (3,)),
    ("mmcv", (E, G, D, C), (None, "batch"), (1, 2, 3)),
    ("alexhex7", (E, G, D, C), ("batch", None), (1, 2, 3)),
    ("tea1528", (E, G, D, C), ("batch", None), (1, 2, 3)),
    ("timm", (E,), ("batch",), (2,)),
    ("gluon", (E,), ("batch", None), (2, 3)),
    ("mmdet2019", (E, D), (None, "batch"), (2,)),
    ("keras_nonlocal", (E, G, D), (None,), (1, 2, 3)),
]

COMBINATIONS = [
    (name, rank, pairwise, norm)
    for name, forms, norms, ranks in OFFERED
    for rank, pairwise, norm in itertools.product(ranks, forms, norms)
]


def exactly(message):
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    (
        "name",
        "rank",
        "pairwise",
        "norm",
        "inner",
        "scale",
        "window",
        "place",
        "bare",
        "concat",
        "eps",
        "zero",
    ),
    FACTS,
)
def test_a_preset_has_the_options_of_its_implementation(
    name, rank, pairwise, norm, inner, scale, window, place, bare, concat, eps, zero
):
    bias = dict.fromkeys(bare.split(), False)
    expected = NonLocalSpec(
        channels=24,
        inner_channels=inner,
        pairwise=pairwise,
        scale=scale,
        subsample=window,
        subsample_at=place,
        bias=bias | {"concat": concat} if pairwise == C else bias,
        norm=norm,
        norm_epsilon=eps,
        zero_init=zero,
    )
    assert NonLocalSpec.preset(name, channels=24, rank=rank, pairwise=pairwise, norm=norm) == expected


@pytest.mark.parametrize(("name", "forms", "norms", "ranks"), OFFERED)
def test_the_table_offers_what_the_implementation_has(name, forms, norms, ranks):
    assert (PRESETS[name].forms, PRESETS[name].norms, PRESETS[name].ranks) == (forms, norms, ranks)


@pytest.mark.parametrize(("name", "forms", "norms", "ranks"), OFFERED)
def test_the_default_is_the_first_form_and_the_first_norm(name, forms, norms, ranks):
    spec = NonLocalSpec.preset(name, channels=24, rank=ranks[-1])
    assert (spec.pairwise, spec.norm) == (forms[0], norms[0])
    assert spec == NonLocalSpec.preset(name, channels=24, rank=ranks[-1], pairwise=forms[0], norm=norms[0])


def test_every_preset_is_in_the_tables():
    assert {row[0] for row in OFFERED} == {row[0] for row in FACTS} == set(PRESETS)


@pytest.mark.parametrize(("name", "rank", "pairwise", "norm"), COMBINATIONS)
def test_a_preset_computes_in_every_rank_form_and_norm_that_it_offers(name, rank, pairwise, norm):
    spec = NonLocalSpec.preset(name, channels=3, rank=rank, pairwise=pairwise, norm=norm)
    x = np.random.default_rng(0).normal(size=(*(2, 2, 4, 6)[: rank + 1], 3))
    z = nonlocal_block(x, init_params(spec, np.random.default_rng(1)), spec)
    assert bool((z == x).all()) == spec.zero_init


@pytest.mark.parametrize(("name", "rank", "pairwise", "norm"), COMBINATIONS)
def test_groups_are_never_preset(name, rank, pairwise, norm):
    spec = NonLocalSpec.preset(name, channels=24, rank=rank, pairwise=pairwise, norm=norm)
    assert (spec.group_size, spec.axes, spec.residual, spec.norm_momentum) == (None, "all", True, 0.1)


def test_the_rank_is_three_unless_it_is_given():
    assert NonLocalSpec.preset("alexhex7", channels=24).subsample == (1, 2, 2)


# An eighth of C, to the nearest multiple of 8, at least 8, and not below nine tenths of that eighth.
@pytest.mark.parametrize(
    ("channels", "inner"),
    [
        (1, 8),
        (64, 8),
        (88, 16),
        (95, 16),
        (96, 16),
        (100, 16),
        (152, 24),
        (160, 24),
        (256, 32),
        (1000, 128),
        (1024, 128),
    ],
)
def test_the_inner_width_of_timm_is_rounded_to_eights(channels, inner):
    assert NonLocalSpec.preset("timm", channels=channels, rank=2).inner_channels == inner


@pytest.mark.parametrize(("name", "inner"), [("mmcv", 1), ("mmdet2019", 1), ("timm", 8)])
def test_one_channel_has_an_inner_channel(name, inner):
    assert NonLocalSpec.preset(name, channels=1, rank=2).inner_channels == inner


# Overrides


@pytest.mark.parametrize(
    "override",
    [
        {"scale": None},
        {"scale": 0.5},
        {"subsample": None},
        {"subsample": (2, 2, 2)},
        {"subsample_at": "projection"},
        {"bias": False},
        {"group_size": 4},
        {"norm_epsilon": 1e-3},
        {"norm_momentum": 0.5},
        {"residual": False},
        {"zero_init": False},
        {"inner_channels": 5},
        {"axes": "space"},
    ],
)
def test_an_override_replaces_its_option_and_no_other(override):
    spec = NonLocalSpec.preset("official", channels=24)
    assert NonLocalSpec.preset("official", channels=24, **override) == spec.replace(**override)
    assert NonLocalSpec.preset("official", channels=24, **override) != spec


def test_what_follows_from_the_form_can_itself_be_replaced():
    spec = NonLocalSpec.preset("mmcv", channels=24, rank=2, pairwise=D, norm="batch", scale="inner", bias=True)
    assert (spec.scale, spec.bias["out"]) == ("inner", True)


@pytest.mark.parametrize("inner", [3, np.int64(3)])
def test_the_scale_of_mmdet_follows_the_inner_channels_that_are_given(inner):
    spec = NonLocalSpec.preset("mmdet2019", channels=24, rank=2, inner_channels=inner)
    assert (spec.inner_channels, spec.scale) == (3, 3**0.5)


@pytest.mark.parametrize(("name", "inner"), [("timm", 8), ("mmdet2019", 12)])
def test_inner_channels_of_none_are_those_of_the_preset(name, inner):
    spec = NonLocalSpec.preset(name, channels=24, rank=2, inner_channels=None)
    assert spec == NonLocalSpec.preset(name, channels=24, rank=2)
    assert spec.inner_channels == inner


def test_numpy_arguments_give_the_same_preset():
    spec = NonLocalSpec.preset(np.str_("mmcv"), channels=np.int64(24), rank=np.int8(2), pairwise=np.str_(G))
    plain = NonLocalSpec.preset("mmcv", channels=24, rank=2, pairwise=G)
    assert (spec, repr(spec)) == (plain, repr(plain))


# Numbers: two implementations whose scale differs from the paper's, computed from their formulas


@pytest.mark.parametrize(
    ("name", "factor"),
    [("mmdet2019", lambda inner, channels: inner**0.5), ("timm", lambda inner, channels: channels**-0.5)],  # noqa: ARG005
)
def test_an_unusual_scale_gives_the_numbers_of_its_implementation(name, factor):
    spec = NonLocalSpec.preset(name, channels=3, rank=2)
    rng = np.random.default_rng(0)
    params = {key: rng.uniform(0.5, 1.5, shape) for key, shape in param_shapes(spec).items()}
    x = rng.normal(size=(1, 5, 7, 3))
    flat = x[0].reshape(35, 3)
    theta, phi, g = (flat @ params[f"{key}.weight"].T + params[f"{key}.bias"] for key in ("theta", "phi", "g"))
    weights = np.exp(factor(spec.inner_channels, 3) * theta @ phi.T)
    y = (weights / weights.sum(1, keepdims=True)) @ g @ params["out.weight"].T + params["out.bias"]
    if spec.norm == "batch":
        y = (y - params["norm.mean"]) / np.sqrt(params["norm.variance"] + 1e-5)
        y = y * params["norm.weight"] + params["norm.bias"]
    np.testing.assert_allclose(nonlocal_block(x, params, spec)[0].reshape(35, 3), flat + y, rtol=1e-12, atol=1e-12)


# Refusals

TWO = f"one of '{E}', '{D}'"
GLUON = "(it fails on the others, and its form without an embedding loses g as well)"
KERAS = "(its concatenation raises an error)"

# Name, rank, overrides; the argument that is refused, what it must be, why if there is a reason, what it got.
LACKING = [
    ("official", 3, {"pairwise": G}, "pairwise", TWO, "", f"'{G}'"),
    ("slowfast", 3, {"pairwise": C}, "pairwise", TWO, "", f"'{C}'"),
    ("pytorchvideo", 3, {"pairwise": G}, "pairwise", TWO, "", f"'{G}'"),
    ("mmdet2019", 2, {"pairwise": C}, "pairwise", TWO, "", f"'{C}'"),
    ("timm", 2, {"pairwise": D}, "pairwise", f"'{E}'", "", f"'{D}'"),
    ("gluon", 3, {"pairwise": G}, "pairwise", f"'{E}'", GLUON, f"'{G}'"),
    ("gluon", 3, {"pairwise": D}, "pairwise", f"'{E}'", GLUON, f"'{D}'"),
    ("keras_nonlocal", 2, {"pairwise": C}, "pairwise", f"one of '{E}', '{G}', '{D}'", KERAS, f"'{C}'"),
    ("timm", 2, {"pairwise": "dot"}, "pairwise", f"'{E}'", "", "'dot'"),
    ("timm", 2, {"pairwise": max}, "pairwise", f"'{E}'", "", "<built-in function max>"),
    ("slowfast", 3, {"norm": None}, "norm", "'batch'", "", "None"),
    ("mmcv", 2, {"norm": "affine"}, "norm", "one of None, 'batch'", "", "'affine'"),
    ("keras_nonlocal", 2, {"norm": "batch"}, "norm", "None", "", "'batch'"),
    ("official", 2, {}, "rank", "3", "", "2"),
    ("timm", 3, {}, "rank", "2", "", "3"),
    ("gluon", 1, {}, "rank", "one of 2, 3", "", "1"),
    ("mmcv", 4, {}, "rank", "one of 1, 2, 3", "", "4"),
]


@pytest.mark.parametrize(("name", "rank", "overrides", "argument", "rule", "reason", "got"), LACKING)
def test_what_an_implementation_lacks_is_refused_in_these_words(name, rank, overrides, argument, rule, reason, got):
    where = " ".join(filter(None, (f"for the preset '{name}'", reason)))
    with pytest.raises(ValueError, match=exactly(f"`{argument}` must be {rule} {where}. Got {got}.")):
        NonLocalSpec.preset(name, channels=24, rank=rank, **overrides)


@pytest.mark.parametrize(
    ("name", "rank", "overrides"),
    [
        (name, rank, {"pairwise": pairwise, "norm": norm})
        for name, forms, norms, ranks in OFFERED
        for rank, pairwise, norm in itertools.product((1, 2, 3), (E, G, D, C), (None, "batch", "affine"))
        if not (rank in ranks and pairwise in forms and norm in norms)
    ],
)
def test_every_other_combination_is_refused_by_the_name_of_the_preset(name, rank, overrides):
    with pytest.raises(ValueError, match=f"^`(pairwise|norm|rank)` must be .* for the preset '{name}'"):
        NonLocalSpec.preset(name, channels=24, rank=rank, **overrides)


def test_an_unknown_name_lists_the_known():
    message = f"`name` must be one of {', '.join(map(repr, PRESETS))}. Got 'resnet'."
    with pytest.raises(ValueError, match=exactly(message)):
        NonLocalSpec.preset("resnet", channels=24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "`channels` must be a positive int. Got 0."),
        ({"rank": 0}, "`rank` must be a positive int. Got 0."),
        ({"inner_channels": 0}, "`inner_channels` must be a positive int. Got 0."),
        (
            {"normalize": "count"},
            f"`normalize` must be None for the named form '{E}', which fixes it. Got 'count'.",
        ),
        (
            {"axes": "time", "subsample": (2, 2)},
            "`subsample` must have one entry for each of the 3 axes of a video. Got (2, 2).",
        ),
    ],
)
def test_a_wrong_value_is_a_value_error_in_these_words(arguments, message):
    with pytest.raises(ValueError, match=exactly(message)):
        NonLocalSpec.preset(**{"name": "mmdet2019", "channels": 24, "rank": 2, **arguments})


@pytest.mark.parametrize("option", ["sub_sample", "use_scale", "channel"])
def test_an_unknown_override_is_a_type_error_that_names_it(option):
    with pytest.raises(TypeError, match=f"^`{option}` must be an option of NonLocalSpec.preset. Got an unknown one"):
        NonLocalSpec.preset("mmcv", channels=24, **{option: True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 3}, "`name` must be the name of a preset. Got 3 of type int."),
        ({"name": ["mmcv"]}, "`name` must be the name of a preset. Got ['mmcv'] of type list."),
        ({"channels": 24.0}, "`channels` must be a positive int. Got 24.0 of type float."),
        ({"channels": True}, "`channels` must be a positive int. Got True of type bool."),
        ({"rank": 2.0}, "`rank` must be a positive int. Got 2.0 of type float."),
        ({"rank": True}, "`rank` must be a positive int. Got True of type bool."),
        ({"pairwise": None}, "`pairwise` must be a string or a function. Got None of type NoneType."),
        ({"norm": []}, "`norm` must be a string or None. Got [] of type list."),
        ({"norm": False}, "`norm` must be a string or None. Got False of type bool."),
        ({"inner_channels": 2.0}, "`inner_channels` must be a positive int. Got 2.0 of type float."),
        ({"zero_init": 1}, "`zero_init` must be a bool. Got 1 of type int."),
    ],
)
def test_a_wrong_type_is_a_type_error_in_these_words(arguments, message):
    with pytest.raises(TypeError, match=exactly(message)):
        NonLocalSpec.preset(**{"name": "mmdet2019", "channels": 24, "rank": 2, **arguments})
