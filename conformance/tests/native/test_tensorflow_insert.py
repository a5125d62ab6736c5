"""Blocks in Keras networks: put in, found, looked at, taken out, and the network as it was in all else."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import nonlocal_core as nlc
from nonlocal_tensorflow import NonLocalBlock, attention_of, check_identity, insert_nonlocal, remove_nonlocal

# Keras gives its own weights to NumPy in the old way when it writes them into a file.
writes_a_file = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


SEQUENCES, IMAGES, CLIPS = random(2, 11, 3), random(2, 5, 7, 3), random(2, 3, 4, 5, 3)


def sequential():
    """Return a Sequential network on sequences."""
    return keras.Sequential(
        [
            keras.Input((11, 3)),
            layers.Conv1D(6, 3, name="conv1"),
            layers.BatchNormalization(name="bn1"),
            layers.ReLU(name="relu1"),
            layers.Conv1D(4, 3, name="conv2"),
        ],
        name="on_sequences",
    )


def residual(x, channels, rank, name):
    """Return a residual block with the names of keras.applications."""
    convolution = {2: layers.Conv2D, 3: layers.Conv3D}[rank]
    y = convolution(channels, 3, padding="same", name=f"{name}_1_conv")(x)
    y = layers.BatchNormalization(name=f"{name}_1_bn")(y)
    y = layers.Dropout(0.3, seed=1, name=f"{name}_drop")(y)
    y = layers.Add(name=f"{name}_add")([y, convolution(channels, 1, name=f"{name}_0_conv")(x)])
    return layers.ReLU(name=f"{name}_out")(y)


def functional(rank=2, name="on_images"):
    """Return a functional network on images or on videos of any size."""
    x = keras.Input((*[None] * rank, 3), name="image")
    y = residual(x, 6, rank, "a")
    y = residual(y, 8, rank, "b")
    return keras.Model(x, keras.ops.relu(layers.Dense(5, name="head")(y)), name=name)


def nested():
    """Return a network around another one, as in transfer learning."""
    x = keras.Input((5, 7, 3))
    y = functional(name="backbone")(layers.Rescaling(2.0)(x))
    return keras.Model(x, layers.GlobalAveragePooling2D()(y), name="nested")


NETWORKS = {
    "sequence": (sequential, SEQUENCES, ["relu1", "conv2"], (None, 9, 6)),
    "image": (functional, IMAGES, ["a_out", "b_1_conv"], (None, None, None, 6)),
    "video": (lambda: functional(3), CLIPS, ["a_out", "b_out"], (None, None, None, None, 6)),
    "nested": (nested, IMAGES, ["backbone/a_out", "backbone"], (None, None, None, 6)),
}
every_network = pytest.mark.parametrize(("build", "x", "places", "shape"), NETWORKS.values(), ids=NETWORKS)


def build_of(name="image"):
    keras.utils.set_random_seed(0)
    return NETWORKS[name][0]()


def block_of(model, name):
    """Return a layer by its name, through nested models."""
    for part in name.split("/"):
        model = model.get_layer(part)
    return model


def randomised(model, *names):
    """Return the model with other parameters in these blocks, so that they are no longer the identity."""
    for name in names:
        block = block_of(model, name)
        block.import_params({k: random(*a.shape, seed=i) for i, (k, a) in enumerate(block.export_params().items())})
    return model


def trained(model):
    """Return the number of trained parameters."""
    return sum(np.prod(weight.shape) for weight in model.trainable_weights)


def assert_equal(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


# Insertion


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_in_training(name):
    x, places = NETWORKS[name][1:3]
    outputs, weights = [], []
    for place in ([], places):
        model = build_of(name)
        model = insert_nonlocal(model, place, norm="batch")[0] if place else model
        outputs.append(model(x, training=True))
        blocks = {id(a) for block in model._flatten_layers() if isinstance(block, NonLocalBlock) for a in block.weights}  # noqa: SLF001 - Keras has no public way
        weights.append([weight.numpy() for weight in model.weights if id(weight) not in blocks])
    assert_equal(outputs[1], outputs[0])
    assert all(np.array_equal(*pair) for pair in zip(*weights, strict=True))


def test_what_follows_sees_what_the_blocks_give():
    plain = build_of("sequence")
    model, _ = insert_nonlocal(plain, ["relu1", "conv2"])
    randomised(model, "relu1_nonlocal_block", "conv2_nonlocal_block")
    y = SEQUENCES
    for name in ("conv1", "bn1", "relu1"):
        y = plain.get_layer(name)(y)
    y = plain.get_layer("conv2")(model.get_layer("relu1_nonlocal_block")(y))
    assert_equal(model(SEQUENCES), model.get_layer("conv2_nonlocal_block")(y))
    assert not np.allclose(model(SEQUENCES), plain(SEQUENCES))


def test_what_follows_in_a_graph_sees_what_the_blocks_give():
    x = keras.Input((5, 7, 3))
    plain = keras.Model(x, layers.Add()([layers.Conv2D(6, 1, name="conv")(x), layers.Conv2D(6, 3, padding="same")(x)]))
    model, _ = insert_nonlocal(plain, ["conv"])
    randomised(model, "conv_nonlocal_block")
    y = plain.get_layer("conv")(IMAGES)
    difference = model.get_layer("conv_nonlocal_block")(y) - y
    np.testing.assert_allclose(model(IMAGES), plain(IMAGES) + difference, rtol=1e-5, atol=1e-5)
    assert np.abs(difference).max() > 1


def test_a_block_in_a_nested_model_serves_each_of_its_calls():
    one, other, backbone = keras.Input((5, 7, 3)), keras.Input((7, 5, 3)), functional(name="backbone")
    plain = keras.Model([one, other], [backbone(one), backbone(other)])
    model, _ = insert_nonlocal(plain, ["backbone/a_out"])
    arrays = [IMAGES, IMAGES.transpose(0, 2, 1, 3)]
    randomised(model, "backbone/a_out_nonlocal_block")
    inner = model.get_layer("backbone")
    for output, x, old in zip(model(arrays), arrays, plain(arrays), strict=True):
        assert_equal(output, inner(x))
        assert not np.allclose(output, old)


@pytest.fixture(scope="module")
def resnet():
    base = keras.applications.ResNet50(weights=None, input_shape=(64, 96, 3), classes=7)
    return base, *insert_nonlocal(base, nlc.recipes.positions(50, 5), norm="batch", subsample=2)


def test_the_papers_blocks_in_a_resnet_50_have_7_36_million_parameters(resnet):
    base, model, insertions = resnet
    assert [insertion.after for insertion in insertions] == [
        "conv3_block2_out",
        "conv3_block4_out",
        "conv4_block2_out",
        "conv4_block4_out",
        "conv4_block6_out",
    ]
    assert [insertion.shape for insertion in insertions] == [(None, 8, 12, 512)] * 2 + [(None, 4, 6, 1024)] * 3
    assert round(sum(insertion.parameters for insertion in insertions) / 1e6, 2) == 7.36
    assert len(model.layers) == len(base.layers) + 5
    assert trained(model) - trained(base) == sum(insertion.parameters for insertion in insertions)


def test_a_resnet_50_computes_the_same(resnet):
    base, model, _ = resnet
    x = random(1, 64, 96, 3)
    assert_equal(model(x), base(x))
    assert check_identity(model) is None


def test_a_second_insertion_keeps_the_first():
    first, _ = insert_nonlocal(build_of(), ["a_out"])
    randomised(first, "a_out_nonlocal_block")
    second, _ = insert_nonlocal(first, ["b_out", "a_out_nonlocal_block"])
    assert_equal(second(IMAGES), first(IMAGES))
    assert second.get_layer("a_out_nonlocal_block") is first.get_layer("a_out_nonlocal_block")
    assert_equal(remove_nonlocal(second)(IMAGES), build_of()(IMAGES))


def structured(kind):
    """Return a network with two inputs and two outputs."""
    x, other = keras.Input((None, None, 3), name="x"), keras.Input((4,), name="other", optional=True)
    y = layers.Conv2D(6, 3, name="conv")(x)
    outputs = {"map": y, "sum": layers.GlobalAveragePooling2D()(y) + layers.Dense(6)(other)}
    pack = {"dict": dict, "list": lambda named: list(named.values())}[kind]
    return keras.Model(pack({"x": x, "other": other}), pack(outputs)), pack({"x": IMAGES, "other": random(2, 4)})


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_the_structure_of_inputs_and_outputs_is_kept(kind):
    plain, arrays = structured(kind)
    model, _ = insert_nonlocal(plain, ["conv"])
    assert [(a.name, a.shape) for a in model.inputs] == [(a.name, a.shape) for a in plain.inputs]
    assert [layer.optional for layer in model.layers if isinstance(layer, layers.InputLayer)] == [False, True]
    found, expected = model(arrays), plain(arrays)
    assert type(found) is type(expected)
    keras.tree.map_structure(assert_equal, found, expected)
    randomised(model, "conv_nonlocal_block")
    changed = keras.tree.map_structure(lambda *pair: not np.allclose(*pair), model(arrays), expected)
    assert all(keras.tree.flatten(changed))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_a_block_has_the_dtype_policy_of_its_place_and_the_method_that_was_asked_for(policy):
    x = keras.Input((5, 7, 3))
    y = layers.Conv2D(6, 1, dtype=policy, name="conv")(x)
    plain = keras.Model(x, layers.Conv2D(4, 1, dtype=policy, name="after")(y))
    model, _ = insert_nonlocal(plain, ["conv"], method="streamed")
    block = model.get_layer("conv_nonlocal_block")
    assert (block.dtype_policy.name, block.method) == (policy, "streamed")
    assert_equal(tf.cast(model(IMAGES), "float64"), tf.cast(plain(IMAGES), "float64"))


class Cast(keras.layers.Layer):
    """A layer whose output has a dtype of its own."""

    def __init__(self, to, **options):
        super().__init__(**options)
        self.to = to

    def call(self, x):
        return tf.cast(x, self.to)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.to)


def test_a_block_keeps_a_dtype_that_its_place_has_by_itself():
    x = keras.Input((5, 7, 3))
    model, _ = insert_nonlocal(keras.Model(x, Cast("float64", name="wide")(x)), ["wide"])
    assert model.get_layer("wide_nonlocal_block").dtype_policy.name == "float64"
    z = model(IMAGES)
    assert z.dtype == "float64"
    assert_equal(z, IMAGES)


@pytest.mark.parametrize("place", ["conv", "relu"])
def test_the_data_format_is_that_of_the_place_or_given(place):
    x = keras.Input((3, 5, 7))
    y = layers.ReLU(name="relu")(layers.Conv2D(6, 1, data_format="channels_first", name="conv")(x))
    plain = keras.Model(x, y)
    given = {} if place == "conv" else {"data_format": "channels_first"}
    _, (insertion,) = insert_nonlocal(plain, [place], **given)
    assert insertion.shape == (None, 5, 7, 6)
    _, (insertion,) = insert_nonlocal(plain, [place], data_format="channels_last")
    assert insertion.shape == (None, 6, 5, 7)


@pytest.mark.parametrize(("name", "place", "later"), [("sequence", "relu1", "conv2"), ("image", "a_out", "b_1_conv")])
def test_features_of_the_new_network_come_from_a_clone(name, place, later):
    plain, x = build_of(name), NETWORKS[name][1]
    model, _ = insert_nonlocal(plain, [place])
    block = randomised(model, f"{place}_nonlocal_block").get_layer(f"{place}_nonlocal_block")
    own = plain.get_layer(later).output
    with pytest.raises(ValueError, match=r"is used 2 times in the model|is not connected to"):
        keras.Model(model.inputs[0], model.get_layer(later).output)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    features = keras.Model(twin.inputs[0], twin.get_layer(later).output)(x)
    before = keras.Model(plain.inputs[0], plain.get_layer(place).output)(x)
    assert_equal(features, plain.get_layer(later)(block(before)))
    assert not np.allclose(features, keras.Model(plain.inputs[0], own)(x))


def test_the_mask_of_keras_reaches_a_block_and_what_follows():
    ids = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    plain = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(10, 6, mask_zero=True, name="words"),
            layers.GlobalAveragePooling1D(),
        ]
    )
    model, _ = insert_nonlocal(plain, ["words"])
    assert_equal(model(ids), plain(ids))
    found = attention_of(model, ids)
    assert_equal(found.weights > 0, np.broadcast_to((ids > 0)[:, None], (2, 4, 4)))


class Custom(keras.Model):
    """A functional model with a training step of its own."""

    def train_step(self, _data):
        return {"own": tf.constant(3.0)}


class Made(keras.Model):
    """A functional model that its constructor makes."""

    def __init__(self, channels):
        x = keras.Input((None, None, 3))
        super().__init__(x, layers.Conv2D(channels, 1, name="conv")(x), name="made")


class CustomChain(keras.Sequential):
    """A Sequential model with a class of its own."""


def test_a_sequential_class_is_kept():
    model, _ = insert_nonlocal(CustomChain([keras.Input((11, 3)), layers.Conv1D(6, 3, name="conv")]), ["conv"])
    assert type(model) is CustomChain
    assert type(remove_nonlocal(model)) is CustomChain


def test_a_class_is_kept_where_it_can_be_made_anew():
    x = keras.Input((None, None, 3))
    plain = Custom(x, layers.Conv2D(6, 1, name="conv")(x))
    model, _ = insert_nonlocal(plain, ["conv"])
    assert type(model) is Custom
    model.compile()
    assert model.fit(IMAGES, verbose=0).history == {"own": [3.0]}


def test_a_class_with_a_constructor_of_its_own_becomes_a_plain_model():
    plain = Made(6)
    model, _ = insert_nonlocal(plain, ["conv"])
    assert type(model) is type(functional())
    assert model.name == "made"
    assert_equal(model(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("name", ["sequence", "nested"])
def test_an_insertion_leaves_the_compiled_network_alone_and_the_new_one_trains(name):
    plain, (x, places) = build_of(name), NETWORKS[name][1:3]
    plain.compile("sgd", loss=lambda target, z: tf.reduce_mean(tf.square(z - target)), jit_compile=False)
    target = np.zeros_like(plain(x))
    model, insertions = insert_nonlocal(plain, places)
    assert not model.compiled
    assert len(plain.fit(x, target, verbose=0).history["loss"]) == 1
    assert_equal(model(x), plain(x))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    losses = model.fit(x, target, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.any(block_of(model, insertion.name).export_params()["out.weight"]) for insertion in insertions)


def test_only_the_blocks_train_in_a_frozen_network():
    plain = build_of()
    plain.trainable = False
    model, _ = insert_nonlocal(plain, ["a_out"])
    block = model.get_layer("a_out_nonlocal_block")
    assert list(map(id, model.trainable_weights)) == list(map(id, block.trainable_weights))


# Files


@writes_a_file
@pytest.mark.parametrize("name", NETWORKS)
def test_both_networks_are_saved_and_loaded(tmp_path, name):
    plain, (x, places) = build_of(name), NETWORKS[name][1:3]
    model, insertions = insert_nonlocal(plain, places, norm="batch", subsample=2)
    randomised(model, *(insertion.name for insertion in insertions))
    for number, network in enumerate((model, plain)):
        path = tmp_path / f"{number}.keras"
        network.save(path)
        loaded = keras.models.load_model(path)
        assert_equal(loaded(x), network(x))
    loaded = keras.models.load_model(tmp_path / "0.keras")
    assert_equal(remove_nonlocal(loaded)(x), plain(x))


@writes_a_file
@pytest.mark.parametrize("name", ["sequence", "image"])
def test_weights_of_the_old_network_are_loaded_by_the_old_network(tmp_path, name):
    plain, (x, places) = build_of(name), NETWORKS[name][1:3]
    plain.save_weights(tmp_path / "old.weights.h5")
    expected = plain(x)
    model, _ = insert_nonlocal(plain, places)
    for weight in plain.weights:
        weight.assign(tf.zeros_like(weight))
    plain.load_weights(tmp_path / "old.weights.h5")
    assert_equal(model(x), expected)


@writes_a_file
@pytest.mark.filterwarnings("ignore:A total of 8 objects could not be loaded:UserWarning")
@pytest.mark.filterwarnings("ignore:Skipping nested container at '_operations_by_depth:UserWarning")
@pytest.mark.parametrize("name", ["sequence", "image"])
def test_the_new_network_loads_them_where_the_blocks_may_be_missing(tmp_path, name):
    plain, (x, places) = build_of(name), NETWORKS[name][1:3]
    plain.save_weights(tmp_path / "old.weights.h5")
    keras.utils.set_random_seed(1)
    model, _ = insert_nonlocal(NETWORKS[name][0](), places)
    assert not np.allclose(model(x), plain(x))
    with pytest.raises(ValueError, match="A total of 8 objects could not be loaded"):
        model.load_weights(tmp_path / "old.weights.h5")
    model.load_weights(tmp_path / "old.weights.h5", skip_mismatch=True)
    assert_equal(model(x), plain(x))


# Removal


@every_network
def test_blocks_taken_out_leave_the_old_network(build, x, places, shape):
    keras.utils.set_random_seed(0)
    plain = build()
    model, insertions = insert_nonlocal(plain, places)
    assert insertions[0].shape == shape
    expected = randomised(model, *(insertion.name for insertion in insertions))(x)
    old = remove_nonlocal(model)
    assert_equal(old(x), plain(x))
    assert_equal(model(x), expected)
    assert (type(old), old.name) == (type(plain), plain.name)
    assert [layer.name for layer in old.layers] == [layer.name for layer in plain.layers]
    assert list(map(id, old.weights)) == list(map(id, plain.weights))
    with pytest.raises(ValueError, match=r"`model` must have at least one inserted non-local block\. Got none"):
        remove_nonlocal(old)


def test_only_inserted_blocks_are_taken_out():
    own = NonLocalBlock(name="own_nonlocal_block")
    plain = keras.Sequential([keras.Input((11, 3)), layers.Conv1D(6, 3, name="conv"), own])
    old = remove_nonlocal(insert_nonlocal(plain, ["conv", "own_nonlocal_block"])[0])
    assert [layer.name for layer in old.layers] == ["conv", "own_nonlocal_block"]


# What is refused


def odd():
    """Return a network with layers that are no places."""
    x = keras.Input((5, 7, 3), name="x")
    twice = layers.ReLU(name="twice")
    y = layers.Conv2D(6, 1, name="conv")(twice(twice(x)))
    parts = layers.Lambda(lambda a: tf.split(a, 2, axis=-1), name="parts")(y)
    digits = Cast("int32", name="digits")(y)
    flat = layers.Flatten(name="flat")(y)
    return keras.Model(x, [*parts, digits, flat, Own(name="own")(y), layers.ReLU(name="conv_relu")(y)])


class Own(keras.Model):
    """A model whose call is its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = layers.Dense(3, name="inner")

    def call(self, x):
        return self.inner(x)


FLOW = "`after` must give one floating-point array of 3 to 5 axes. Got "
OWN = "`model` must be functional or Sequential; a class of one's own calls a NonLocalBlock as any other layer. Got "


@pytest.mark.parametrize(
    ("after", "error", "words"),
    [
        (["twice"], ValueError, "`after` must be passed once in a run of the network. Got 'twice', passed 2 times"),
        (["parts"], ValueError, f"{FLOW}'parts', which gives list"),
        (["digits"], ValueError, f"{FLOW}'digits', which gives int32 of shape (None, 5, 7, 6)"),
        (["flat"], ValueError, f"{FLOW}'flat', which gives float32 of shape (None, 210)"),
        (["x"], ValueError, "`after` must be in the network. Got 'x'"),
        ({"res4": [1]}, ValueError, "`after` must be names, since stages are known in one ResNet"),
        (["own/inner"], TypeError, OWN),
    ],
)
def test_a_wrong_place_is_named_and_nothing_changes(after, error, words):
    model = odd()
    names, expected = [layer.name for layer in model.layers], model(IMAGES)
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        insert_nonlocal(model, after)
    assert [layer.name for layer in model.layers] == names
    keras.tree.map_structure(assert_equal, model(IMAGES), expected)


def test_a_place_in_a_nested_model_is_near_its_full_name():
    with pytest.raises(ValueError, match=r"Got 'a_out'; near names: .*'backbone/a_out'"):
        insert_nonlocal(nested(), ["a_out"])


def test_a_layer_that_only_hangs_on_the_network_is_no_place():
    model = functional()
    model.spare = layers.ReLU(name="spare")
    # Keras lists it among the layers from 3.15 on.
    with pytest.raises(ValueError, match=r"`after` must be (in the network\.|passed once .*) Got 'spare'"):
        insert_nonlocal(model, ["spare"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "sorted"}, ValueError, "`method` must be 'auto', 'pairwise' or 'streamed'"),
        ({"data_format": "NCHW"}, ValueError, "`data_format` must be one of 'channels_last', 'channels_first'"),
        ({"channels": 6}, TypeError, "`channels` must be an option of insert_nonlocal"),
        ({"subsampel": 2}, TypeError, "`subsampel` must be an option of insert_nonlocal"),
    ],
)
def test_wrong_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        insert_nonlocal(odd(), ["conv"], **options)


def test_unknown_channels_are_asked_for():
    x = keras.Input((None, None))
    with pytest.raises(ValueError, match="`channels` must be given where the channels of the input are unknown"):
        insert_nonlocal(keras.Model(x, layers.ReLU(name="relu")(x)), ["relu"])


class OwnCall(keras.Model):
    """A functional model that computes something beside its graph."""

    def call(self, x, training=None, mask=None):
        return 2 * super().call(x, training, mask)


@pytest.mark.parametrize("call", [lambda model: insert_nonlocal(model, ["conv"]), remove_nonlocal])
@pytest.mark.parametrize("build", [Own, lambda: OwnCall((x := keras.Input((5, 3))), layers.ReLU()(x)), lambda: 3])
def test_networks_of_other_kinds_are_refused(build, call):
    with pytest.raises(TypeError, match=f"^{re.escape(OWN)}"):
        call(build())


@pytest.mark.parametrize("call", [lambda model: insert_nonlocal(model, ["conv"]), remove_nonlocal])
def test_a_network_that_is_not_built_is_refused(call):
    model = keras.Sequential([layers.Conv1D(6, 3, name="conv")])
    with pytest.raises(ValueError, match=r"^`model` must be built, so that the shapes in it are known\. Got <"):
        call(model)


@pytest.mark.parametrize("call", [check_identity, lambda model: attention_of(model, IMAGES)])
def test_what_is_no_layer_is_refused(call):
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Layer\. Got 3 of type int"):
        call(3)


# Identity


@pytest.mark.parametrize(("norm", "named"), [(None, "out.weight"), ("batch", "norm.weight")])
def test_a_host_that_initialises_again_is_noticed(norm, named):
    model, _ = insert_nonlocal(nested(), ["backbone/a_out", "backbone"], norm=norm)
    for weight in model.trainable_weights:
        weight.assign(tf.ones_like(weight))
    names = [f"{name}_nonlocal_block" for name in ("backbone", "backbone/a_out")]
    with pytest.raises(ValueError, match="must have blocks that are the identity") as caught:
        check_identity(model)
    assert all(f"{named} of {name!r}" in str(caught.value) for name in names)


# Attention


class Masked(keras.Model):
    """A network of another kind, that gives its block a mask and keeps what enters it; graph: whether it is traced."""

    def __init__(self, graph, **options):
        super().__init__()
        self.stem, self.block = layers.Conv2D(6, 3), NonLocalBlock(6, zero_init=False, **options)
        self.noise = keras.random.SeedGenerator(0)
        self.run = tf.function(self.direct) if graph else self.direct

    def direct(self, x, shown):
        return self.block(self.stem(x) + 0 * keras.random.normal((), seed=self.noise), key_mask=shown)

    def call(self, inputs):
        return self.run(*inputs)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_rows_are_those_of_the_block_on_what_entered_it_under_its_mask(graph, pairwise):
    model = Masked(graph, pairwise=pairwise, subsample=(1, 2))
    shown = np.ones((2, 3, 5), bool)
    shown[0, :, 2:], shown[1, 1] = False, False
    model([IMAGES, shown])
    weights = [weight.numpy() for weight in model.variables]
    found = attention_of(model, [IMAGES, shown], positions=[7, 2])
    expected = model.block.attention(model.stem(IMAGES), [7, 2], shown)
    assert_equal(found.weights, expected)
    assert (found.sizes, found.positions.tolist(), found.spec) == ((3, 5), [7, 2], model.block.spec)
    assert np.count_nonzero(found.weights[0], axis=-1).tolist() == [3, 3]
    assert not np.allclose(found.weights, model.block.attention(model.stem(IMAGES), [7, 2]))
    assert all(np.array_equal(weight.numpy(), old) for weight, old in zip(model.variables, weights, strict=True))
    assert "call" not in vars(model.block)
    assert not tf.config.functions_run_eagerly()


def test_a_block_in_a_nested_model_is_found():
    model, _ = insert_nonlocal(nested(), ["backbone/a_out", "backbone"], subsample=2)
    assert attention_of(model, IMAGES, "backbone/a_out", [3]).spec.channels == 6
    assert attention_of(model, IMAGES, "backbone", [3]).spec.channels == 5


def test_a_network_that_is_not_built_shows_its_attention():
    model = keras.Sequential([layers.Conv2D(6, 3), NonLocalBlock(subsample=2)])
    found = attention_of(model, IMAGES, positions=[0])
    assert found.weights.shape == (2, 1, 2)
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1, rtol=1e-6)
    assert_equal(attention_of(model, IMAGES, positions=[0]).weights, found.weights)


def test_attention_of_channels_first_has_the_grid_of_the_positions():
    block = NonLocalBlock(3, data_format="channels_first")
    found = attention_of(block, np.moveaxis(IMAGES, -1, 1), positions=[3])
    assert found.sizes == (5, 7)
    assert_equal(found.weights, block.attention(np.moveaxis(IMAGES, -1, 1), [3]))


def test_attention_of_bfloat16_is_given_as_float32():
    block = NonLocalBlock(3, dtype="bfloat16")
    found = attention_of(block, IMAGES, positions=[1])
    assert found.weights.dtype == np.float32
    assert_equal(found.weights, tf.cast(block.attention(tf.cast(IMAGES, "bfloat16"), [1]), "float32"))


def test_a_block_that_runs_twice_is_refused():
    x, block = keras.Input((5, 7, 3)), NonLocalBlock(3, name="block")
    model = keras.Model(x, block(block(x)))
    with pytest.raises(ValueError, match=r"`block` must be passed once in a run of.* Got 'block', passed 2 times"):
        attention_of(model, IMAGES, positions=[0])
    assert "call" not in vars(block)
