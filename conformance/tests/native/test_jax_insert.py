"""Blocks in networks of Flax modules: insertion, removal, what they attend to, and folded norms."""

import copy
import functools
import pickle
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close
from nonlocal_jax import NonLocalBlock, attention_of, check_identity, insert_nonlocal, remove_nonlocal

pytestmark = pytest.mark.usefixtures("_compile_fast")


class Unit(nnx.Module):
    """A residual unit with all that has a mode."""

    def __init__(self, channels, rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return x + scale * self.dropout(nnx.relu(self.norm(self.conv(x))))


class Pair(nnx.Module):
    def __call__(self, x):
        return x, x


class Network(nnx.Module):
    """Every kind of place: in a list, in a dict, never called, called twice, and with results that are no features."""

    def __init__(self, rngs):
        self.stem = nnx.Sequential(nnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.relu)
        self.stages = nnx.List([Unit(6, rngs), Unit(6, rngs)])
        self.heads = nnx.Dict(classes=nnx.Linear(6, 5, rngs=rngs))
        self.twice = nnx.Conv(6, 6, (1, 1), rngs=rngs)
        self.never = nnx.Conv(6, 6, (1, 1), rngs=rngs)
        self.pair = Pair()

    def __call__(self, x, flip=False):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, scale=-1.0 if flip else 1.0)
        x, _ = self.pair(self.twice(self.twice(x)))
        return self.heads["classes"](x.mean(axis=(1, 2)))


def randomise(module, seed=0, kinds=(nnx.Param, nnx.BatchStat)):
    """Give every parameter and statistic a value of its own."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Any(*kinds))
    nnx.update(module, jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.1, 0.6, a.shape), a.dtype), state))


@functools.cache
def made(seed):
    model = Network(nnx.Rngs(seed))
    randomise(model, seed)
    return model


def network(seed=0):
    return nnx.clone(made(seed))  # drawn anew, each would take several times as long


def network_with_alias():
    model = network()
    model.alias = model.stem
    return model


def images(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, 3)), jnp.float32)


X = images(2, 7, 5)


def insert(model, after=("stages.0",), example_input=X, seed=9, **options):
    return insert_nonlocal(model, after, rngs=nnx.Rngs(seed), example_input=example_input, **options)


def with_blocks(after=("stages.0",), **options):
    """Return a network with blocks that add something."""
    model = network()
    insert(model, after, **options)
    randomise(model, seed=3)
    return model


def state_of(model):
    """Return what a call may change or an optimiser trains, by its path."""
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngCount))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def assert_equal(actual, expected):
    """Compare two dicts of arrays, bit for bit."""
    assert list(actual) == list(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_near(actual, expected):
    """Compare two dicts of arrays, up to rounding where they are floats."""
    assert list(actual) == list(expected)
    for name, array in expected.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            assert_close(name, np.asarray(actual[name]), np.asarray(array, "float64"), dtype=array.dtype)
        else:
            np.testing.assert_array_equal(actual[name], array)


def call(model, x):
    return model(x)


run = nnx.jit(call)  # networks of equal graphs share what is compiled


# What insertion leaves as it was


# XLA fuses the layers around a block in another way than without it: bits are promised of eager networks alone.
@pytest.mark.parametrize(
    ("function", "compare", "norm", "training"),
    [
        (call, assert_equal, "batch", True),
        (run, assert_near, "batch", True),
    ],
)
def test_a_network_with_new_blocks_computes_what_it_did(function, compare, norm, training):
    before, after = network(), network()
    insert(after, ["stem.layers.0", "stages.1", "stages.1.conv"], norm=norm)
    for model in (before, after):
        model.set_attributes(deterministic=not training, use_running_average=not training)
    compare({"z": function(after, X)}, {"z": function(before, X)})
    inserted = state_of(after)
    compare({name: inserted[name] for name in state_of(before)}, state_of(before))


def test_an_inserted_block_takes_the_batches_of_a_mapped_axis_for_one():
    model, x = nnx.Sequential(nnx.Linear(3, 6, rngs=nnx.Rngs(0))), images(4, 5)
    insert(model, ["layers.0"], x, norm="batch", axis_name="parts")
    randomise(model)
    graph, state = nnx.split(model)

    def step(state, x):
        part = nnx.merge(graph, state)
        part.set_attributes(use_running_average=False)
        return part(x), nnx.state(part, nnx.BatchStat)

    z, moved = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="parts"))(state, x.reshape(2, 2, 5, 3))
    model.layers[0].nonlocal_block.axis_name = None
    whole = model(x)
    assert_close("z", np.asarray(z).reshape(whole.shape), np.asarray(whole, "float64"), dtype="float32")
    for found, expected in zip(jax.tree.leaves(moved), jax.tree.leaves(nnx.state(model, nnx.BatchStat)), strict=True):
        assert_close("statistics", np.asarray(found[0]), np.asarray(expected, "float64"), dtype="float32")


class Plain(nnx.Module, pytree=False):
    """A module that is no pytree."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


MODES = []


class Moded(nnx.Module):
    """A module that tells in which mode it runs."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        MODES.append(self.dropout.deterministic)
        return x


def test_a_module_that_is_no_pytree_takes_a_block_and_stays_none():
    model = Plain(nnx.Rngs(0))
    host = nnx.Sequential(model)
    insert(host, ["layers.0"])
    assert type(model) is not Plain
    model.more = [nnx.Param(jnp.ones(1))]  # a pytree would refuse it in a plain list
    assert host(X).shape == (2, 7, 5, 6)


def test_the_network_is_traced_in_evaluation():
    MODES.clear()
    insert(nnx.Sequential(Moded(nnx.Rngs(0))), ["layers.0"])
    assert set(MODES) == {True}


def test_weights_of_the_backbone_are_loaded_as_before():
    saved = nnx.state(network(seed=5))
    model = with_blocks()
    nnx.update(model, saved)
    assert_equal({name: state_of(model)[name] for name in state_of(network(seed=5))}, state_of(network(seed=5)))


@pytest.mark.parametrize(("mode", "expected"), [("train", False), ("eval", True)])
def test_a_block_is_in_the_mode_of_its_network(mode, expected):
    model = network()
    getattr(model, mode)()
    insert(model, norm="batch")
    block = model.stages[0].nonlocal_block
    assert block.use_running_average is expected
    model.train()
    assert block.use_running_average is False


def test_a_network_without_a_mode_gets_blocks_in_training_as_new_modules_are():
    model = nnx.Sequential(nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0)))
    insert(model, ["layers.0"])
    assert model.layers[0].nonlocal_block.use_running_average is False


# What it gives


@pytest.mark.parametrize(
    "example",
    [X, np.asarray(X), (X, True), {"x": X, "flip": True}, jax.ShapeDtypeStruct(X.shape, X.dtype)],
    ids=["array", "numpy", "positional", "keywords", "shape"],
)
def test_an_example_may_be_given_in_every_way_of_a_call(example):
    (insertion,) = insert(network(), example_input=example)
    assert insertion.shape == (2, 7, 5, 6)


def test_a_symbolic_size_is_reported_as_unknown():
    batch, height = jax.export.symbolic_shape("b,h")
    (insertion,) = insert(network(), example_input=jax.ShapeDtypeStruct((batch, height, 5, 3), jnp.float32))
    assert (insertion.shape, insertion.flops) == ((None, None, 5, 6), None)


def test_dtypes_and_the_method_reach_the_block():
    model = network()
    insert(model, method="streamed", dtype=jnp.bfloat16, param_dtype=jnp.float16)
    block = model.stages[0].nonlocal_block
    assert (block.method, block.dtype) == ("streamed", jnp.bfloat16)
    assert {a.dtype.name for a in jax.tree.leaves(nnx.state(block))} == {"float16"}


# Copies, files and transformations


def test_the_optimiser_trains_new_blocks():
    model = network()
    insert(model, pairwise="dot_product")
    before = state_of(model)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.mean(jnp.square(model(X))))(model)
        optimizer.update(model, gradients)
        return gradients

    gradients, block = state_of(step(model, optimizer)), "stages.0.nonlocal_block."
    assert set(gradients) == {name for name in before if not name.endswith(("mean", "var", "count"))}
    # W_z is zero at the start, and alone has a gradient.
    moved = {
        name for name, array in state_of(model).items() if block in name and not np.array_equal(array, before[name])
    }
    assert moved == {f"{block}out.kernel", f"{block}out.bias"}


@pytest.mark.parametrize("copied", [copy.deepcopy, nnx.clone])
def test_a_copy_computes_the_same_with_blocks_of_its_own(copied):
    model = with_blocks()
    model.eval()
    twin = copied(model)
    expected = run(model, X)
    assert np.array_equal(run(twin, X), expected)
    randomise(twin.stages[0].nonlocal_block, seed=8)
    assert not np.array_equal(run(twin, X), expected)
    assert np.array_equal(run(model, X), expected)
    remove_nonlocal(twin)
    assert hasattr(model.stages[0], "nonlocal_block")


def test_networks_and_their_graphs_can_be_pickled():
    model = nnx.Sequential(nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0)))  # JAX's own relu cannot
    insert(model, ["layers.0"])
    randomise(model)
    twin, graph = (pickle.loads(pickle.dumps(value)) for value in (model, nnx.graphdef(model)))  # noqa: S301 - its own
    assert nnx.graphdef(twin) == graph == nnx.graphdef(model)
    assert np.array_equal(run(twin, X), run(model, X))
    remove_nonlocal(twin)
    assert type(twin.layers[0]) is nnx.Conv
    assert not np.allclose(run(twin, X), run(model, X))


def test_a_network_that_0_1_0_has_pickled_computes_what_it_did():
    # Two LayerNorms with a block after the first, pickled when `insert` and `hosts` lay beside each other.
    saved = (Path(__file__).parent / "saved" / "jax_network.pkl").read_bytes()
    model, bare = (pickle.loads(saved) for _ in range(2))  # noqa: S301 - its own
    remove_nonlocal(bare)
    x = np.random.default_rng(3).normal(size=(2, 5, 7, 4)).astype("float32")
    block, flow = model.layers[0].nonlocal_block, np.asarray(bare.layers[0](x), "float64")
    expected = nlc.nonlocal_block(flow, block.export_params(), block.spec)
    assert_close("z", np.asarray(model.layers[0](x)), expected, dtype="float32")
    assert type(bare.layers[0]) is nnx.LayerNorm
    assert not np.allclose(run(model, x), run(bare, x))


def test_a_plain_dict_carries_the_state_to_an_equal_network():
    model, twin = with_blocks(), network(seed=4)
    insert(twin, seed=5)
    state = nnx.state(twin)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(model)))
    nnx.update(twin, state)
    for each in (model, twin):
        each.eval()
    assert np.array_equal(run(twin, X), run(model, X))


def test_equal_networks_with_blocks_are_traced_once():
    traces = []

    @nnx.jit
    def traced(model, x):
        traces.append(None)
        return model(x)

    for seed in (0, 1):
        model = network(seed)
        insert(model, seed=seed)
        traced(model, X)
    assert len(traces) == 1


def test_a_place_keeps_its_class_and_the_signature_of_its_call():
    model = with_blocks()
    assert isinstance(model.stages[0], Unit)
    assert type(model.stages[0]).__name__ == "Unit"
    assert type(model.stages[1]) is Unit
    model.eval()  # or dropout alone makes two calls differ
    assert not np.allclose(model.stages[0](jnp.ones((1, 4, 3, 6)), scale=2.0), model.stages[0](jnp.ones((1, 4, 3, 6))))


# Removal


def test_removal_gives_the_old_network_back():
    model = network()
    before, graph = state_of(model), nnx.graphdef(model)
    insert(model, ["stages.0", "stem.layers.0"])
    remove_nonlocal(model)
    assert nnx.graphdef(model) == graph
    assert_equal(state_of(model), before)


def test_blocks_of_the_networks_own_are_not_removed():
    model = nnx.Sequential(NonLocalBlock(6, rngs=nnx.Rngs(0)), nnx.Conv(6, 6, (1, 1), rngs=nnx.Rngs(0)))
    insert(model, ["layers.1"], jnp.ones((1, 4, 3, 6)))
    remove_nonlocal(model)
    assert isinstance(model.layers[0], NonLocalBlock)
    with pytest.raises(ValueError, match="`model` must have at least one inserted non-local block"):
        remove_nonlocal(model)


# Wrong places and options


@pytest.mark.parametrize(
    ("after", "error", "words"),
    [
        (["stem.layers.1"], ValueError, "be a flax.nnx.Module. Got 'stem.layers.1', which is a function"),
        (["stages"], ValueError, "`after` must be passed once in a run of the network. Got 'stages', passed 0 times"),
        (["never"], ValueError, "`after` must be passed once in a run of the network. Got 'never', passed 0 times"),
        (["twice"], ValueError, "`after` must be passed once in a run of the network. Got 'twice', passed 2 times"),
        (["pair"], ValueError, "`after` must give one floating-point array .* Got 'pair', which gives tuple"),
        (["heads.classes"], ValueError, r"Got 'heads.classes', which gives float32 of shape \(2, 5\)"),
        ({"res3": [1]}, ValueError, "`after` must be names, since stages are known in one ResNet"),
    ],
)
def test_what_is_no_place_is_refused_and_changes_nothing(after, error, words):
    model = network()
    before, graph = state_of(model), nnx.graphdef(model)
    after = after if isinstance(after, dict) else ["stages.1", *after]
    with pytest.raises(error, match=words):
        insert(model, after)
    assert nnx.graphdef(model) == graph
    assert_equal(state_of(model), before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "sorted"}, ValueError, "`method` must be 'auto', 'pairwise' or 'streamed'"),
        ({"channels": 6}, TypeError, "`channels` must be an option of insert_nonlocal"),
        ({"subsampel": 2}, TypeError, "`subsampel` must be an option of insert_nonlocal"),
    ],
)
def test_wrong_options_are_named_and_change_nothing(options, error, words):
    model = network()
    graph = nnx.graphdef(model)
    with pytest.raises(error, match=words):
        insert(model, **options)
    assert nnx.graphdef(model) == graph


@pytest.mark.parametrize(
    ("after", "options"),
    [
        (["stages.0", "halved"], {"subsample": 3}),
        (["stages.0"], {"dtype": "int32"}),
        (["stages.0"], {"method": "sorted"}),
        (["stages.0", "never"], {}),
    ],
)
def test_a_refused_insertion_draws_no_random_numbers(after, options):
    class Halved(Network):
        def __call__(self, x):
            return self.halved(self.stages[0](self.stem(x)))

    rngs = nnx.Rngs(0)
    model = Halved(rngs)
    model.rngs, model.halved = rngs, nnx.Conv(6, 6, (3, 3), strides=4, rngs=rngs)
    before = state_of(model)
    assert "rngs.params.count" in before or "rngs.default.count" in before
    with pytest.raises((TypeError, ValueError)):
        insert_nonlocal(model, after, rngs=rngs, example_input=X, **options)
    assert_equal(state_of(model), before)


def test_the_source_of_random_weights_is_checked():
    model = network()
    with pytest.raises(TypeError, match=r"`rngs` must be a flax.nnx.Rngs. Got 0 of type int"):
        insert_nonlocal(model, ["stages.0"], rngs=0, example_input=X)


@pytest.mark.parametrize(
    ("rngs", "options", "error", "words"),
    [
        (0, {}, TypeError, "`rngs` must be a flax.nnx.Rngs. Got 0 of type int"),
        (nnx.Rngs(0), {"dtype": jnp.int32}, TypeError, "`dtype` must have a floating-point dtype. Got int32"),
        (nnx.Rngs(0), {"param_dtype": "int8"}, TypeError, "`param_dtype` must have a floating-point dtype. Got int8"),
    ],
)
def test_a_block_checks_where_its_weights_come_from(rngs, options, error, words):
    with pytest.raises(error, match=words):
        NonLocalBlock(6, rngs=rngs, **options)


class Transformed(nnx.Module):
    """A network that scans over its layers, and maps one module over positions."""

    def __init__(self, rngs):
        convolution = partial(nnx.Conv, 3, 3, (1, 1))
        self.layers = nnx.split_rngs(splits=4)(nnx.vmap(lambda rngs: convolution(rngs=rngs)))(rngs)
        self.mapped = convolution(rngs=rngs)

    def __call__(self, x):
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(self.mapped, x)


@pytest.mark.parametrize("place", ["layers", "mapped"])
def test_a_place_within_a_transformation_is_refused(place):
    model = Transformed(nnx.Rngs(0))
    graph, expected = nnx.graphdef(model), model(X)
    with pytest.raises(ValueError, match=rf"outside of nnx.scan and nnx.vmap. Got \['{place}'\]"):
        insert(model, [place])
    assert nnx.graphdef(model) == graph
    assert np.array_equal(model(X), expected)


def test_an_example_that_the_network_cannot_take_raises_the_error_of_the_network():
    with pytest.raises(ValueError, match="feature dimension size"):
        insert(network(), example_input=X[..., :2])


@pytest.mark.parametrize("place", ["stem", "alias"])
def test_a_shared_module_is_a_place_under_all_its_names(place):
    model = network_with_alias()
    (insertion,) = insert(model, [place])
    assert insertion.name == f"{place}.nonlocal_block"
    assert isinstance(model.stem.nonlocal_block, NonLocalBlock)
    with pytest.raises(ValueError, match="`after` must have no block yet"):
        insert(network_with_alias(), ["stem", "alias"])


@pytest.mark.parametrize("function", [remove_nonlocal, check_identity, partial(attention_of, x=X), insert])
def test_a_model_must_be_a_module(function):
    with pytest.raises(TypeError, match=r"`model` must be a flax.nnx.Module. Got 3 of type int"):
        function(3)


# Identity


@pytest.mark.parametrize(("norm", "name"), [(None, "out.weight"), ("batch", "norm.weight")])
def test_a_network_that_initialises_all_its_parameters_again_is_noticed(norm, name):
    model = network()
    insert(model, norm=norm)
    key = jax.random.key(0)
    nnx.update(model, jax.tree.map(lambda a: jax.random.normal(key, a.shape), nnx.state(model, nnx.Param)))
    with pytest.raises(
        ValueError, match=f"must have blocks that are the identity.*{name} of 'stages.0.nonlocal_block'"
    ):
        check_identity(model)


# A ResNet with the names of torchvision's


class Bottleneck(nnx.Module):
    def __init__(self, channels, inner, out, stride, rngs):
        self.conv1 = nnx.Conv(channels, inner, (1, 1), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(inner, inner, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.conv3 = nnx.Conv(inner, out, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(out, rngs=rngs)
        changes = stride > 1 or channels != out
        self.downsample = (
            nnx.Conv(channels, out, (1, 1), strides=stride, use_bias=False, rngs=rngs) if changes else None
        )

    def __call__(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return nnx.relu(self.bn3(self.conv3(nnx.relu(self.conv2(self.conv1(x))))) + shortcut)


class ResNet(nnx.Module):
    def __init__(self, width, rngs):
        self.conv1 = nnx.Conv(3, width, (7, 7), strides=2, rngs=rngs)
        channels = width
        for stage, depth in enumerate((3, 4, 6, 3), 1):
            inner, blocks = width * 2 ** (stage - 1), nnx.List()
            for index in range(depth):
                blocks.append(Bottleneck(channels, inner, 4 * inner, 1 + (index == 0 < stage - 1), rngs))
                channels = 4 * inner
            setattr(self, f"layer{stage}", blocks)
        self.fc = nnx.Linear(channels, 5, rngs=rngs)

    def __call__(self, x):
        x = self.conv1(x)
        for stage in range(1, 5):
            for block in getattr(self, f"layer{stage}"):
                x = block(x)
        return self.fc(x.mean(axis=(1, 2)))


def test_the_papers_five_blocks_find_their_places_in_a_resnet_50_and_have_the_papers_parameters():
    model = nnx.eval_shape(lambda: ResNet(64, nnx.Rngs(0)))
    shape = jax.ShapeDtypeStruct((2, 35, 29, 3), jnp.float32)
    insertions = insert(model, nlc.recipes.positions(50, 5), shape, subsample=2, norm="batch")
    assert [(i.after, i.shape[1:]) for i in insertions] == [
        ("layer2.1", (9, 8, 512)),
        ("layer2.3", (9, 8, 512)),
        ("layer3.1", (5, 4, 1024)),
        ("layer3.3", (5, 4, 1024)),
        ("layer3.5", (5, 4, 1024)),
    ]
    assert sum(i.parameters for i in insertions) == pytest.approx(7.36e6, rel=1e-3)


# What blocks attend to


class Masked(nnx.Module):
    """A network with a block of its own, called inside a transformation, with a mask."""

    def __init__(self, transform, rngs):
        self.block = NonLocalBlock(3, subsample=2, pairwise="dot_product", rngs=rngs)
        self.transform = transform

    def __call__(self, x, key_mask=None):
        return self.transform(lambda block, x: block(2 * x, key_mask=key_mask))(self.block, x)


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, nnx.remat], ids=["eager", "jit", "remat"])
def test_attention_heeds_the_mask_that_the_network_gives(transform):
    model = Masked(transform, nnx.Rngs(0))
    randomise(model)
    key_mask = np.random.default_rng(2).random((2, 7, 5)) < 0.4
    found = attention_of(model, (X, key_mask), positions=[3])
    assert np.array_equal(found.weights, model.block.attention(2 * X, [3], key_mask))
    assert not np.allclose(found.weights, attention_of(model, X, positions=[3]).weights)
    by_name = attention_of(model, {"x": X, "key_mask": key_mask}, "block", [3])
    assert np.array_equal(by_name.weights, found.weights)


def test_attention_of_a_narrow_computation_is_float32():
    model = Masked(lambda f: f, nnx.Rngs(0))
    randomise(model)
    found = attention_of(model, X.astype(jnp.bfloat16))
    assert found.weights.dtype == np.float32
    assert np.array_equal(found.weights, model.block.attention(2 * X.astype(jnp.bfloat16)).astype(np.float32))


class Repeated(nnx.Module):
    def __init__(self, rngs):
        self.block, self.idle = NonLocalBlock(3, rngs=rngs), NonLocalBlock(3, rngs=rngs)

    def __call__(self, x):
        return self.block(self.block(x))


@pytest.mark.parametrize(
    ("model", "block", "words"),
    [
        (
            network,
            None,
            "be the name of a non-local block or of the place before it. Got None; blocks: none",
        ),
        (partial(Repeated, nnx.Rngs(0)), None, "Got None; blocks: 'block', 'idle'"),
        (partial(Repeated, nnx.Rngs(0)), "blok", "Got 'blok'; blocks: 'block', 'idle'"),
        (partial(Repeated, nnx.Rngs(0)), "block", "`block` must be passed once .* Got 'block', passed 2 times"),
        (partial(Repeated, nnx.Rngs(0)), "idle", "`block` must be passed once .* Got 'idle', passed 0 times"),
        (with_blocks, "stages.1", "Got 'stages.1'; blocks: 'stages.0.nonlocal_block'"),
    ],
)
def test_a_block_whose_attention_is_not_clear_is_refused(model, block, words):
    with pytest.raises(ValueError, match=words):
        attention_of(model(), X, block)


# Folded norms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["batch", "affine"])
def test_a_folded_norm_computes_the_same(norm, bias):
    block = NonLocalBlock(6, norm=norm, bias=bias, pairwise="dot_product", method="reassociated", rngs=nnx.Rngs(0))
    randomise(block)
    block.eval()
    folded, x = block.fold_norm(), images(2, 7, 5) @ jnp.ones((3, 6)) + jnp.arange(6)
    expected = block(x)
    assert folded.spec == block.spec.replace(norm=None, bias={**block.spec.bias, "out": True})
    assert (folded.method, folded.use_running_average) == ("reassociated", True)
    np.testing.assert_allclose(folded(x), expected, rtol=0, atol=8 * np.finfo("float32").eps * np.abs(expected).max())


def test_a_folded_block_keeps_the_dtypes_of_its_parameters():
    block = NonLocalBlock(6, norm="batch", dtype=jnp.float16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    folded = block.fold_norm()
    assert {a.dtype.name for a in jax.tree.leaves(nnx.state(folded))} == {"bfloat16"}
    assert folded.dtype == jnp.float16


def test_a_folded_block_serves_in_the_place_of_the_old_one():
    model = with_blocks(norm="batch")
    model.eval()
    expected = run(model, X)
    model.stages[0].nonlocal_block = model.stages[0].nonlocal_block.fold_norm()
    assert nnx.state(model.stages[0].nonlocal_block, nnx.BatchStat) == nnx.State({})
    np.testing.assert_allclose(run(model, X), expected, rtol=1e-5)
    remove_nonlocal(model)


def test_a_block_without_norm_has_nothing_to_fold():
    with pytest.raises(ValueError, match="`norm` must be 'batch' or 'affine' to be folded"):
        NonLocalBlock(6, rngs=nnx.Rngs(0)).fold_norm()
