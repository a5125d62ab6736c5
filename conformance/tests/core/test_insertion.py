"""Places by name, recipes, reports and the test of identity that insertion into networks shares."""

import numpy as np
import pytest

from nonlocal_core import NonLocalSpec, cost, init_params, nonlocal_block, recipes
from nonlocal_core.networks.folding import fold_norm
from nonlocal_core.networks.insertion import Insertion, check_identities, resolve_places

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NAMES = {
    "torchvision": lambda stage, block: f"layer{stage}.{block}",
    "inside": lambda stage, block: f"backbone.layer{stage}.{block}",
    "in Flax": lambda stage, block: f"layer{stage}.layers.{block}",
    "transformers": lambda stage, block: f"encoder.stages.{stage - 1}.layers.{block}",
    "pytorchvideo": lambda stage, block: f"blocks.{stage}.res_blocks.{block}",
    "pytorchvideo with a pool": lambda stage, block: f"blocks.{stage + (stage > 1)}.res_blocks.{block}",
    "keras": lambda stage, block: f"conv{stage + 1}_block{block + 1}_out",
    "keras, nested": lambda stage, block: f"backbone/conv{stage + 1}_block{block + 1}_out",
}


def network(naming, depth=50):
    """Return names of a whole network, those of its residual blocks among others."""
    name = NAMES[naming]
    blocks = [name(stage, block) for stage, count in enumerate(STAGES[depth], 1) for block in range(count)]
    return ["stem", *blocks, *(f"{block}.conv1" for block in blocks), "layer4.2.extra", "conv1_relu", "head"]


@pytest.mark.parametrize(
    ("depth", "blocks", "expected"),
    [
        (50, 1, {"res4": [4]}),
        (50, 5, {"res3": [1, 3], "res4": [1, 3, 5]}),
        (50, 10, {"res3": [0, 1, 2, 3], "res4": [0, 1, 2, 3, 4, 5]}),
        (101, 1, {"res4": [21]}),
        (101, 5, {"res3": [1, 3], "res4": [6, 13, 20]}),
        (101, 10, {"res3": [0, 1, 2, 3], "res4": [2, 6, 10, 14, 18, 22]}),
        (152, 1, {"res4": [34]}),
        (152, 5, {"res3": [3, 7], "res4": [11, 23, 35]}),
        (152, 10, {"res3": [1, 3, 5, 7], "res4": [5, 11, 17, 23, 29, 35]}),
    ],
)
def test_the_papers_places_are_known_by_depth_and_number(depth, blocks, expected):
    assert recipes.positions(depth, blocks) == expected


def test_the_places_of_mmaction_differ():
    assert recipes.positions(recipe="mmaction") == {"res3": [0, 2], "res4": [0, 2, 4]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depth": 34}, r"`depth` must be one of \[50, 101, 152\] for the recipe 'paper'. Got 34"),
        ({"blocks": 2}, r"`blocks` must be one of \[1, 5, 10\] for the recipe 'paper'. Got 2"),
        ({"depth": 101, "recipe": "mmaction"}, r"`depth` must be one of \[50\] for the recipe 'mmaction'. Got 101"),
        ({"recipe": "papers"}, "`recipe` must be one of 'paper', 'mmaction'. Got 'papers'"),
    ],
)
def test_an_unknown_recipe_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        recipes.positions(**arguments)


def test_changing_what_a_recipe_gave_leaves_the_recipe_alone():
    recipes.positions()["res3"].append(9)
    assert recipes.positions()["res3"] == [1, 3]


@pytest.mark.parametrize("depth", STAGES)
@pytest.mark.parametrize("naming", NAMES)
def test_places_are_found_in_every_common_naming(naming, depth):
    found = recipes.places(network(naming, depth), recipes.positions(depth))
    stages = {"res3": 2, "res4": 3}
    expected = [NAMES[naming](stages[stage], i) for stage, indices in recipes.positions(depth).items() for i in indices]
    assert found == expected


@pytest.mark.parametrize(
    ("names", "where", "words"),
    [
        (["conv1", "fc"], {"res3": [1]}, "stages are known in one ResNet with names as in torchvision.*Got none"),
        (network("torchvision") + network("inside"), {"res3": [1]}, "in one ResNet .* Got 2: "),
        (network("torchvision"), {"layer3": [1]}, "stages among res2, res3, res4, res5. Got 'layer3'"),
        (network("torchvision"), {"res3": [4]}, "indices below 4 in res3. Got 4"),
        (network("torchvision"), {"res3": [-1]}, "indices below 4 in res3. Got -1"),
    ],
)
def test_places_that_are_not_there_are_refused(names, where, words):
    with pytest.raises(ValueError, match=words):
        recipes.places(names, where)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (1, "a list of indices for each stage. Got 1 of type int"),
        ("12", "a list of indices for each stage. Got '12' of type str"),
        ([1.0], "indices below 4 in res3. Got 1.0 of type float"),
        ([True], "indices below 4 in res3. Got True of type bool"),
    ],
)
def test_indices_of_a_wrong_type_are_refused(indices, words):
    with pytest.raises(TypeError, match=words):
        recipes.places(network("torchvision"), {"res3": indices})


def test_names_are_taken_as_they_are():
    assert resolve_places(("b", "a"), ["a", "b", "c"]) == ["b", "a"]


def test_stages_become_names():
    assert resolve_places({"res4": [4]}, network("torchvision")) == ["layer3.4"]


@pytest.mark.parametrize(
    ("after", "error", "words"),
    [
        ("layer3.4", TypeError, "`after` must be a list of names, or positions by stage. Got 'layer3.4' of type str"),
        (None, TypeError, "`after` must be a list of names"),
        ([], ValueError, r"`after` must name at least one place. Got \[\]"),
        ({}, ValueError, r"`after` must name at least one place"),
        ({"res3": []}, ValueError, r"`after` must name at least one place"),
        (["layer3.7"], ValueError, "be in the network. Got 'layer3.7'; near names: 'layer3.[0-5]'"),
        (["layer3.4", "layer3.4"], ValueError, "name each place once. Got 'layer3.4'"),
        (["?"], ValueError, "be in the network. Got '\\?'; near names: none"),
        ([3], TypeError, "be a list of names, or positions by stage. Got \\[3\\] of type list"),
        (
            [["layer3.4"]],
            TypeError,
            "be a list of names, or positions by stage. Got \\[\\['layer3.4'\\]\\] of type list",
        ),
    ],
)
def test_what_names_no_place_is_refused(after, error, words):
    with pytest.raises(error, match=words):
        resolve_places(after, network("torchvision"))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_an_insertion_reports_what_the_cost_model_counts(norm, pairwise):
    spec = NonLocalSpec(channels=8, norm=norm, pairwise=pairwise)
    insertion = Insertion("layer3.4", "layer3.4.nonlocal_block", (2, 5, 7, 8), spec)
    counted = cost(spec, (2, 5, 7, 8))
    assert insertion.parameters == counted.parameters
    assert insertion.flops == min(method.flops for method in counted.methods.values())
    assert str(insertion).startswith(f"layer3.4.nonlocal_block after layer3.4: {pairwise}, 8 channels on 5 x 7, ")
    assert f"{counted.parameters:,} parameters, " in str(insertion)


def test_an_insertion_of_unknown_size_has_no_flops():
    insertion = Insertion("a", "b", (None, None, 7, 8), NonLocalSpec(channels=8))
    assert insertion.flops is None
    assert str(insertion).endswith("8 channels on ? x 7, 148 parameters")


def block(**options):
    """Return the parameters of a new block and its spec."""
    spec = NonLocalSpec(channels=4, **options)
    return init_params(spec, np.random.default_rng(0)), spec


@pytest.mark.parametrize("norm", [None, "batch", "affine"])
def test_new_blocks_are_the_identity(norm):
    assert check_identities({"a": block(norm=norm), "b": block(norm=norm, bias=False)}) is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "out.weight"),
        ({}, "out.bias"),
        ({"norm": "batch"}, "norm.weight"),
        ({"norm": "batch"}, "norm.bias"),
        ({"norm": "affine"}, "norm.bias"),
    ],
)
@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_block_that_adds_something_is_named(options, name, value):
    params, spec = block(**options)
    params[name] = params[name].copy()
    params[name].flat[-1] = value
    with pytest.raises(ValueError, match=f"`model` must have blocks that are the identity.*Got .*{name} of 'b'"):
        check_identities({"a": block(), "b": (params, spec)})


def test_a_block_without_residual_connection_is_named():
    with pytest.raises(ValueError, match="no residual connection of 'b'"):
        check_identities({"b": block(residual=False)})


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="`model` must have at least one non-local block"):
        check_identities({})


@pytest.mark.parametrize("norm", ["batch", "affine"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_norm_computes_the_same(norm, bias):
    rng = np.random.default_rng(1)
    params, spec = block(norm=norm, bias=bias, subsample=2)
    params = {name: rng.uniform(0.5, 2, array.shape) for name, array in params.items()}
    x = rng.normal(size=(2, 6, 5, 4))
    folded, without = fold_norm(params, spec)
    assert (without.norm, without.bias["out"], without.subsample) == (None, True, 2)
    np.testing.assert_allclose(nonlocal_block(x, folded, without), nonlocal_block(x, params, spec), rtol=1e-13)


def test_a_block_without_norm_has_nothing_to_fold():
    with pytest.raises(ValueError, match="`norm` must be"):
        fold_norm(*block())
