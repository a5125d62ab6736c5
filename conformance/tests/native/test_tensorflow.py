"""What Keras' users expect of a layer, beyond the numbers."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import nonlocal_core as nlc
from nonlocal_tensorflow import NonLocalBlock, nonlocal_op

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")

# Keras gives its own weights to NumPy in the old way when it writes them into a file.
writes_a_file = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def fill(block):
    """Give every parameter of a block a value that is not the one it starts with."""
    rng = np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, a.shape) for name, a in block.export_params().items()})
    return block


def filled_block(**options):
    """Return a block for 6 channels in float64, no parameter of which is zero."""
    return fill(NonLocalBlock(6, **{"dtype": "float64", **options}))


def random_input(*shape, dtype="float64"):
    return np.random.default_rng(1).normal(size=shape).astype(dtype)


def random_mask(*shape):
    return np.random.default_rng(2).random(shape) < 0.6


def product(theta, phi):
    return tf.matmul(theta, phi, transpose_b=True)


def assert_equal(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def assert_near(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


EMBEDDED = [f"{layer}/{kind}" for layer in ("theta", "phi", "g", "out") for kind in ("kernel", "bias")]
NAMES = [
    ({"pairwise": "gaussian"}, EMBEDDED[4:]),
    ({"norm": "batch"}, [*EMBEDDED, "norm/gamma", "norm/beta", "norm/moving_mean", "norm/moving_variance"]),
    ({"pairwise": "dot_product", "norm": "affine"}, ["norm.weight", "norm.bias", *EMBEDDED]),
    (
        {"pairwise": "concatenation", "bias": {"concat": True}},
        ["concat.weight", "concat.bias", *EMBEDDED],
    ),
    ({"bias": False}, EMBEDDED[::2]),
]


@pytest.mark.parametrize(("options", "names"), NAMES)
def test_the_weights_exist_before_the_first_call_under_their_names(options, names):
    block = NonLocalBlock(6, name="block", **options)
    assert block.built
    assert [weight.path for weight in block.weights] == [f"block/{name}" for name in names]


@pytest.mark.parametrize(("options", "names"), NAMES)
@pytest.mark.parametrize(
    "start",
    [lambda block: block(tf.ones((2, 5, 7, 6))), lambda block: block.build((None, None, None, 6))],
    ids=["called", "built"],
)
def test_a_block_that_reads_its_channels_is_the_same(options, names, start):
    block, known = NonLocalBlock(name="block", **options), NonLocalBlock(6, **options)
    assert block.weights == []
    start(block)
    assert [weight.path for weight in block.weights] == [f"block/{name}" for name in names]
    assert block.spec == known.spec
    x = random_input(2, 5, 7, 6, dtype="float32")
    known.import_params(fill(block).export_params())
    assert_equal(block(x), known(x))


def test_calls_make_no_weights():
    block = filled_block(norm="batch")
    before = list(map(id, block.weights))
    for shape in [(2, 5, 7, 6), (3, 4, 6), (1, 4, 3, 2, 6)]:
        block(random_input(*shape), training=True)
    assert list(map(id, block.weights)) == before


def test_weights_start_at_values_of_their_own_that_follow_the_seed():
    def start():
        keras.utils.set_random_seed(3)
        return [NonLocalBlock(6).export_params() for _ in range(2)]

    (first, second), again = start(), start()
    assert not np.array_equal(first["theta.weight"], first["phi.weight"])
    assert not np.array_equal(first["theta.weight"], second["theta.weight"])
    assert all(np.array_equal(first[name], again[0][name]) for name in first)


class Subclassed(keras.Model):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def call(self, x, training=None):
        return self.block(x, training=training)


def functional(block):
    x = keras.Input((None, None, 6), dtype=block.dtype)
    return keras.Model(x, block(x))


@pytest.mark.parametrize(
    "model", [lambda block: keras.Sequential([block]), functional, Subclassed], ids=["sequential", "functional", "own"]
)
@pytest.mark.parametrize("training", [False, True])
def test_every_kind_of_model_computes_what_the_block_computes(model, training):
    block, x = filled_block(norm="batch", subsample=2, dtype="float32"), random_input(2, 5, 7, 6, dtype="float32")
    params = block.export_params()
    z = model(block)(x, training=training)
    assert_near(z, nlc.nonlocal_block(x, params, block.spec, training=training), 1e-4)
    moved = not np.array_equal(block.export_params()["norm.mean"], params["norm.mean"])
    assert moved == training


def test_a_symbolic_call_knows_shape_and_dtype_and_refuses_what_does_not_fit():
    z = NonLocalBlock(6, dtype="mixed_bfloat16")(keras.Input((None, 7, 6)))
    assert (z.shape, z.dtype) == ((None, None, 7, 6), "bfloat16")
    with pytest.raises(ValueError, match=r"`x` must have 6 channels\. Got 5 channels"):
        NonLocalBlock(6)(keras.Input((None, 5)))
    with pytest.raises(TypeError, match=r"`x` must have a floating-point dtype\. Got int32"):
        NonLocalBlock(6)(keras.Input((None, 6), dtype="int32"))
    with pytest.raises(TypeError, match=r"`key_mask` must be boolean\. Got float32"):
        NonLocalBlock(6)(keras.Input((None, 6)), key_mask=keras.Input((None,)))
    assert NonLocalBlock(6).compute_output_shape([None, 4, 6]) == (None, 4, 6)


@pytest.mark.parametrize(
    ("options", "masked", "jit"),
    [
        ({"subsample": 2}, False, False),
        ({"subsample": 2}, True, True),
        ({"pairwise": "concatenation", "subsample": 2, "subsample_at": "input"}, True, False),
        ({"pairwise": "concatenation", "subsample": 2, "subsample_at": "input"}, False, True),
        ({"pairwise": "dot_product", "axes": (1,)}, False, False),
        ({"pairwise": "dot_product", "axes": (1,)}, True, True),
    ],
)
def test_one_trace_with_unknown_sizes_serves_them_all(options, masked, jit):
    block = filled_block(**options)
    traces = []

    def call(x, mask=None):
        traces.append(1)
        return block(x, key_mask=mask), block.attention(x, [3, 1], mask)

    sizes = [tf.TensorSpec([None, None, None, 6], tf.float64), tf.TensorSpec([None, None, None], tf.bool)]
    traced = tf.function(call, input_signature=sizes[: 1 + masked], jit_compile=jit)
    for shape in [(2, 5, 7), (3, 4, 6)]:
        x, mask = random_input(*shape, 6), random_mask(*shape) if masked else None
        z, w = traced(x, mask) if masked else traced(x)
        params = block.export_params()
        assert_near(z, nlc.nonlocal_block(x, params, block.spec, mask))
        assert_near(w, nlc.attention(x, params, block.spec, [3, 1], mask))
    assert len(traces) == 1


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("pairwise", ["gaussian", "dot_product"])
def test_channels_unknown_to_the_trace_are_those_of_the_block(pairwise, jit):
    block, x = filled_block(pairwise=pairwise, axes=(0,)), random_input(2, 5, 3, 6)
    signature = [tf.TensorSpec([None] * 4, tf.float64)]
    traced = tf.function(block.call, input_signature=signature, jit_compile=jit)
    assert_near(traced(x), nlc.nonlocal_block(x, block.export_params(), block.spec))
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        traced(random_input(2, 5, 3, 12))


def test_groups_of_frames_are_cut_where_the_number_of_frames_is_unknown():
    block = filled_block(group_size=2, subsample=(1, 2, 2), norm="batch")
    traced = tf.function(block, input_signature=[tf.TensorSpec([None, None, None, None, 6], tf.float64)])
    for frames in (4, 6):
        x = random_input(2, frames, 5, 3, 6)
        assert_near(traced(x), nlc.nonlocal_block(x, block.export_params(), block.spec))


CONFIGS = [
    {},
    {"channels": 6, "pairwise": "gaussian", "scale": "inner", "norm": "batch", "norm_epsilon": 1e-3},
    {"channels": 6, "inner_channels": np.int64(2), "axes": [1], "bias": {"g": False}, "method": "pairwise"},
    {"inner_channels": 1, "pairwise": "concatenation", "bias": {"concat": True}, "data_format": "channels_first"},
    {"channels": 6, "subsample": (1, 2), "subsample_at": "input", "residual": False, "zero_init": False},
    {"channels": 6, "name": "own", "dtype": "mixed_bfloat16", "trainable": False, "autocast": False, "scale": -0.3},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_the_config_is_json_and_makes_an_equal_layer(options):
    block = NonLocalBlock(**options)
    config = json.loads(json.dumps(block.get_config()))
    twin = NonLocalBlock.from_config(config)
    assert twin.get_config() == block.get_config()
    for layer in (block, twin):
        layer.build((None, 6, None, None) if layer.data_format == "channels_first" else (None, None, None, 6))
    assert twin.spec == block.spec
    names = ("method", "data_format", "name", "dtype_policy", "trainable", "autocast")
    assert [getattr(twin, name) for name in names] == [getattr(block, name) for name in names]
    twin.set_weights(block.get_weights())
    x = random_input(2, 6, 4, 6, dtype="float32")
    assert_equal(twin(x), block(x))


def test_a_function_is_refused_by_its_name_where_a_file_would_need_it():
    block = NonLocalBlock(6, pairwise=product, normalize="softmax")
    with pytest.raises(ValueError, match=r"`pairwise` must be one of the named forms .*product"):
        block.get_config()
    assert block(random_input(2, 5, 6)).shape == (2, 5, 6)


def video_model(**options):
    """Return a model with a mask, unknown sizes, and a block that reads its channels."""
    x, mask = keras.Input((None, None, None, 6), name="x"), keras.Input((None, None, None), dtype="bool", name="mask")
    block = NonLocalBlock(subsample=(1, 2, 2), norm="batch", **options)
    return keras.Model([x, mask], block(x, key_mask=mask)), fill(block)


@writes_a_file
def test_a_saved_model_is_loaded_without_a_word_about_the_block(tmp_path):
    (model, block), path = video_model(pairwise="concatenation", bias={"concat": True}), tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    twin = next(layer for layer in loaded.layers if isinstance(layer, NonLocalBlock))
    assert twin.spec == block.spec
    arrays = [random_input(2, 4, 5, 3, 6, dtype="float32"), random_mask(2, 4, 5, 3)]
    assert_equal(loaded(arrays), model(arrays))
    assert_equal(loaded(arrays, training=True), model(arrays, training=True))
    assert_equal(loaded.layers[-1].get_weights()[-1], block.get_weights()[-1])


def test_a_checkpoint_of_tensorflow_holds_every_weight(tmp_path):
    block, twin = filled_block(norm="batch"), NonLocalBlock(6, norm="batch", dtype="float64")
    path = tf.train.Checkpoint(block=block).save(tmp_path / "block")
    tf.train.Checkpoint(block=twin).restore(path).assert_consumed()
    params = twin.export_params()
    assert all(np.array_equal(a, params[name]) for name, a in block.export_params().items())


def test_a_cloned_model_has_weights_of_its_own():
    model = keras.Sequential([keras.Input((5, 6)), NonLocalBlock(zero_init=False)])
    clone = keras.models.clone_model(model)
    assert clone.layers[0].spec == model.layers[0].spec
    assert not set(map(id, clone.weights)) & set(map(id, model.weights))


@pytest.mark.parametrize(("dtype", "jit"), [("float32", True), ("mixed_bfloat16", False)])
def test_it_learns_from_its_start(dtype, jit):
    keras.utils.set_random_seed(0)
    x = random_input(8, 9, 6, dtype="float32")
    model = keras.Sequential([NonLocalBlock(norm="batch", dtype=dtype)])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=jit)
    target = x + x.mean(axis=1, keepdims=True)
    losses = model.fit(x, target, batch_size=4, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert model.predict(x, verbose=0).shape == x.shape


@pytest.mark.parametrize("norm", [None, "batch", "affine"])
@pytest.mark.parametrize(
    ("policy", "weights", "result"),
    [
        ("mixed_float16", "float32", "float16"),
        ("mixed_bfloat16", "float32", "bfloat16"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float64", "float64", "float64"),
    ],
)
def test_the_dtype_policy_decides_the_dtypes(policy, weights, result, norm):
    block, x = filled_block(dtype=policy, norm=norm), random_input(2, 5, 7, 6, dtype="float32")
    plain = NonLocalBlock(6, norm=norm)
    plain.import_params(block.export_params())
    assert {weight.dtype for weight in block.weights} == {weights}
    assert block(x).dtype == result
    assert block.attention(x).dtype == "float32"
    for training in (False, True):
        z, expected = tf.cast(block(x, training=training), "float32"), plain(x, training=training)
        assert np.abs(z - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_rounds_the_input_and_the_result_as_keras_does_unless_autocast_is_off(policy):
    exact = filled_block(dtype=policy, autocast=False)
    rounding, x = filled_block(dtype=policy), random_input(2, 5, 7, 6, dtype="float32")
    z, rounded = exact(x), tf.cast(x, rounding.compute_dtype)
    assert z.dtype == "float32"
    assert exact(keras.Input((5, 7, 6))).dtype == "float32"
    branch = tf.cast(z - x, rounding.compute_dtype)
    assert_near(tf.cast(rounding(x), "float32"), tf.cast(rounded + branch, "float32"), 0.02)
    assert_equal(rounding(x), rounding(rounded))


def test_gradients_of_mixed_precision_are_finite_and_in_float32():
    block, x = NonLocalBlock(6, norm="batch", dtype="mixed_float16", zero_init=False), random_input(2, 9, 6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(tf.cast(block(x, training=True), "float32")))
    gradients = tape.gradient(loss, block.trainable_weights)
    assert {gradient.dtype for gradient in gradients} == {tf.float32}
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def embedded(ids):
    """Return an embedding with the mask of Keras, and the same without."""
    # Keras' own start is unseeded and so small that batch norm divides by next to nothing.
    start = keras.initializers.RandomNormal(stddev=1.0, seed=0)
    x = keras.layers.Embedding(10, 6, embeddings_initializer=start, mask_zero=True)(ids)
    return x, tf.identity(x)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_the_mask_of_keras_masks_keys_alone_and_passes_through(norm):
    block, ids = filled_block(dtype="float32", norm=norm), np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    x, plain = embedded(ids)
    z = block(x, training=True)
    expected = nlc.nonlocal_block(
        plain.numpy(), filled_block(norm=norm).export_params(), block.spec, ids > 0, training=True
    )
    assert_near(z, expected, 1e-5)
    pooled = keras.layers.GlobalAveragePooling1D()(z)
    assert_near(pooled, [row[kept].mean(axis=0) for row, kept in zip(expected, ids > 0, strict=True)], 1e-5)


def test_a_key_mask_goes_before_the_mask_of_keras():
    block, ids = filled_block(dtype="float32"), np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    x, plain = embedded(ids)
    other = random_mask(2, 4)
    assert_equal(block(x, key_mask=other), block(plain, key_mask=other))
    assert_equal(block(plain, mask=other), block(plain, key_mask=other))
    assert not np.allclose(block(x), block(plain))


@pytest.mark.parametrize("place", ["projection", "input"])
def test_a_window_whose_valid_values_are_all_infinitely_small_is_pooled_to_just_that(place):
    block = NonLocalBlock(1, pairwise="dot_product", scale=1e-30, subsample=2, subsample_at=place)
    block.import_params(
        {name: np.full(a.shape, float(name[-6:] == "weight")) for name, a in block.export_params().items()}
    )
    x, mask = np.ones((1, 4, 1), "float32"), np.array([[True, False, True, True]])
    x[0, 0] = -np.inf
    expected = nlc.attention(x, block.export_params(), block.spec, [2], mask)
    assert expected[0, 0, 0] == -np.inf
    assert_equal(block.attention(x, [2], mask), expected)


def test_masked_time_steps_do_not_reach_a_pooled_sequence():
    steps = random_input(2, 6, 6, dtype="float32")
    steps[:, 4:] = 0
    block = filled_block(dtype="float32", subsample=2)
    model = keras.Sequential([keras.layers.Masking(), block])
    z, short = model(steps), block(steps[:, :4])
    assert_near(z[:, :4], short, 1e-5)


@pytest.mark.parametrize("shape", [(11,), (5, 7), (4, 5, 3)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("residual", [True, False])
def test_channels_first_is_the_same_block(shape, residual):
    last = filled_block(subsample=2, norm="batch", residual=residual)
    first = filled_block(subsample=2, norm="batch", residual=residual, data_format="channels_first")
    x, mask = random_input(3, *shape, 6), random_mask(3, *shape)
    moved = np.moveaxis(x, -1, 1)
    assert_near(first(moved, key_mask=mask), np.moveaxis(last(x, key_mask=mask), -1, 1))
    assert_near(first.attention(moved, [1, 0], mask), last.attention(x, [1, 0], mask))
    lazy = NonLocalBlock(data_format="channels_first")
    assert lazy(keras.Input((6, *(None for _ in shape)))).shape == (None, 6, *(None for _ in shape))
    assert lazy.spec.channels == 6


def test_the_data_format_is_that_of_keras_unless_it_is_named():
    keras.config.set_image_data_format("channels_first")
    try:
        formats = NonLocalBlock(6).data_format, NonLocalBlock(6, data_format="channels_last").data_format
    finally:
        keras.config.set_image_data_format("channels_last")
    assert formats == ("channels_first", "channels_last")
    assert NonLocalBlock(6).data_format == "channels_last"


def test_a_frozen_block_trains_nothing_and_keeps_its_statistics():
    block = filled_block(norm="batch")
    block.trainable = False
    before = block.export_params()
    x = random_input(1, 1, 6)
    assert_near(block(x, training=True), nlc.nonlocal_block(x, before, block.spec))
    after = block.export_params()
    assert block.trainable_weights == []
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_its_batch_norm_is_that_of_keras():
    block = NonLocalBlock(6, norm="batch", norm_momentum=0.25, norm_epsilon=0.5)
    assert isinstance(block.norm, keras.layers.BatchNormalization)
    assert (block.norm.momentum, block.norm.epsilon) == (0.75, 0.5)
    twin = keras.layers.BatchNormalization(momentum=0.75, epsilon=0.5)
    twin.build((None, None, 6))
    fill(block)
    twin.set_weights(block.norm.get_weights())
    r = random_input(3, 5, 6, dtype="float32")
    for training in (True, False):
        assert_near(block.norm(r, training=training), twin(r, training=training), 1e-5)
        assert_near(block.norm.moving_variance, twin.moving_variance, 1e-6)


def test_the_statistics_of_many_positions_keep_their_digits():
    block = NonLocalBlock(4, norm="batch", norm_momentum=1.0)
    r = (1000 + np.random.default_rng(0).normal(size=(4, 25_000, 4))).astype("float32")
    block.norm(r, training=True)
    wide = r.astype("float64")
    assert_near(block.norm.moving_mean, wide.mean(axis=(0, 1)), 1e-7)
    assert_near(block.norm.moving_variance, wide.var(axis=(0, 1)), 1e-5)


def test_a_stateless_call_returns_the_new_statistics():
    block, x = filled_block(norm="batch"), random_input(2, 5, 6)
    before = block.export_params()
    z, new = block.stateless_call(block.trainable_variables, block.non_trainable_variables, x, training=True)
    expected = nlc.updated_statistics(x, before, block.spec)
    assert_near(z, nlc.nonlocal_block(x, before, block.spec, training=True))
    assert_near(new[0], expected["norm.mean"])
    assert_near(new[1], expected["norm.variance"])
    assert_equal(block.export_params()["norm.mean"], before["norm.mean"])


def test_a_rematerialised_block_has_the_same_gradients():
    x, plain = tf.constant(random_input(2, 9, 6)), filled_block(pairwise="concatenation")
    with keras.RematScope(mode="full"):
        block = filled_block(pairwise="concatenation")
    gradients = []
    for layer in (plain, block):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(x)))
        gradients.append(tape.gradient(loss, layer.trainable_weights))
    for one, other in zip(*gradients, strict=True):
        assert_near(other, one)


@pytest.mark.parametrize(
    ("dtype", "jit", "masked"),
    [
        *((dtype, None, masked) for dtype in ("float16", "float64") for masked in (False, True)),
        *(("float16", jit, True) for jit in (False, True)),
        *(("float64", jit, False) for jit in (False, True)),
    ],
)
def test_at_a_tie_the_gradient_goes_to_the_first_valid_position(dtype, jit, masked):
    block = NonLocalBlock(1, pairwise="gaussian", subsample=2, subsample_at="input", residual=False, dtype=dtype)
    block.import_params({name: np.ones(a.shape) for name, a in block.export_params().items()})
    mask = np.ones((1, 2, 3, 2), bool)
    mask[0, 0, 0, 0] = not masked

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = block(x, key_mask=mask)
        return tape.gradient(z, x)

    call = gradient if jit is None else tf.function(gradient, jit_compile=jit)
    d = call(tf.ones((1, 2, 3, 2, 1), dtype)).numpy()[0, ..., 0]
    # One window of two frames, the last row being a remainder: its only key has weight 1 in each of 12 queries.
    expected = np.zeros((2, 3, 2))
    expected[(0, 0, 1) if masked else (0, 0, 0)] = 12
    assert_equal(d, expected)


@pytest.mark.parametrize("pairwise", FORMS)
def test_second_derivatives_of_the_operation_are_those_of_finite_differences(pairwise):
    theta, phi, g = (tf.constant(random_input(2, size, 3)) for size in (5, 4, 4))
    options = {"pairwise": pairwise, "scale": -0.7, "key_mask": tf.constant([[True, False, True, True], [False] * 4])}
    if pairwise == "concatenation":
        options |= {"concat_weight": random_input(6), "concat_bias": tf.constant(0.3, tf.float64)}
    direction = tf.constant(random_input(2, 5, 3)[::-1])

    def slope(theta):
        with tf.GradientTape() as tape:
            tape.watch(theta)
            y = tf.reduce_sum(tf.square(nonlocal_op(theta, phi, g, **options)))
        return tape.gradient(y, theta)

    with tf.GradientTape() as tape:
        tape.watch(theta)
        along = tf.reduce_sum(slope(theta) * direction)
    expected = (slope(theta + 1e-6 * direction) - slope(theta - 1e-6 * direction)) / 2e-6
    assert_near(tape.gradient(along, theta, unconnected_gradients="zero"), expected, 1e-7)


def test_exported_parameters_are_copies():
    block = filled_block()
    block.export_params()["g.weight"][:] = 0
    exported = block.export_params()
    assert exported["g.weight"].all()
    block.import_params({name: np.zeros_like(a) for name, a in exported.items()})
    assert exported["g.weight"].all()


def test_parameters_of_bfloat16_are_exported_as_float32():
    block = filled_block(dtype="bfloat16")
    exported = block.export_params()
    assert {a.dtype for a in exported.values()} == {np.dtype("float32")}
    assert_equal(exported["g.weight"], tf.cast(tf.transpose(block.g.kernel.value), "float32"))


def test_parameters_that_do_not_exist_yet_are_asked_for_in_words():
    with pytest.raises(ValueError, match="`channels` must be given, or the block built, before it has parameters"):
        NonLocalBlock().export_params()


def test_positions_may_be_a_tensor_and_the_block_unbuilt():
    x = random_input(2, 5, 7, 6, dtype="float32")
    block = NonLocalBlock(zero_init=False)
    assert_near(block.attention(x, tf.constant([3, 1])), block.attention(x).numpy()[:, [3, 1]], 1e-6)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metod": "auto"}, TypeError, "`metod` must be an option of NonLocalBlock. .* nearest is `method`"),
        ({"subsampel": 2}, TypeError, "`subsampel` must be an option of NonLocalBlock"),
        ({"channels": None, "subsampel": 2}, TypeError, "`subsampel` must be an option of NonLocalBlock"),
        ({"channels": None, "scale": 0}, ValueError, "`scale` must be"),
        (
            {"method": "sorted"},
            ValueError,
            "`method` must be 'auto', 'pairwise' or 'streamed' for the form .*Got 'sorted'",
        ),
        ({"autocast": "no"}, TypeError, "`autocast` must be a bool. Got 'no'"),
        ({"channels": tf.constant(4.0)}, TypeError, "`channels` must be a positive int. Got "),
        ({"data_format": "NCHW"}, ValueError, "`data_format` must be one of 'channels_last', 'channels_first'"),
        ({"pairwise": "cosine"}, ValueError, "`pairwise` must be one of"),
        ({"channels": 0}, ValueError, "`channels` must be a positive int. Got 0"),
    ],
)
def test_wrong_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        NonLocalBlock(**{"channels": 6, **options})


@pytest.mark.parametrize("training", ["x", 1, [], tf.constant(value=True)], ids=["text", "number", "list", "tensor"])
def test_training_is_a_bool_or_none(training):
    with pytest.raises(TypeError, match=r"`training` must be a bool\. Got "):
        NonLocalBlock(4, norm="batch")(tf.zeros((2, 5, 4)), training=training)


@pytest.mark.parametrize("x", [None, [1.0], "x"])
def test_attention_of_what_is_no_array_is_refused(x):
    with pytest.raises(TypeError, match=r"^`x` must be an array\. Got "):
        NonLocalBlock(4).attention(x)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((None, None, None), "`channels` must be given where the channels of the input are unknown"),
        ((None, 1, 6), "`subsample` must leave at least one window on spatial axis 0"),
        ((None, 6), "`x` must have 1, 2 or 3 spatial axes"),
    ],
)
def test_a_shape_that_does_not_fit_leaves_the_block_unbuilt(shape, words):
    block = NonLocalBlock(subsample=2)
    with pytest.raises(ValueError, match=words):
        block.build(shape)
    assert not block.built
    block.build((None, 4, 8))
    assert block.spec.channels == 8


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ("tensorflow=None", "Install them with `pip install 'nonlocal-core[tensorflow]'`."),
        ("tensorflow=N(), keras=None", "needs TensorFlow, and Keras 3 on its TensorFlow backend"),
        (
            "tensorflow=N(), keras=N(config=N(backend=lambda: 'jax'))",
            "Set the environment variable KERAS_BACKEND=tensorflow before Keras is imported. Got KERAS_BACKEND=jax.",
        ),
    ],
    ids=["no tensorflow", "no keras", "another backend"],
)
def test_the_import_says_what_is_missing(modules, words):
    code = (
        f"import sys; from types import SimpleNamespace as N; sys.modules.update({modules})\nimport nonlocal_tensorflow"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "ImportError: nonlocal_tensorflow needs" in ran.stderr
    assert words in ran.stderr


@pytest.mark.parametrize(
    ("options", "shape", "mask", "training", "words"),
    [
        ({"group_size": 2}, (2, 3, 2, 2, 4), None, False, "`group_size` must divide"),
        ({"subsample": 3}, (1, 2, 2, 4), None, False, "`subsample` must leave at least one window"),
        ({}, (3, 5, 4), (1, 5), False, "`key_mask` must have the shape"),
        ({"norm": "batch"}, (1, 1, 4), None, True, "`x` must have more than one value per channel"),
        ({"norm": "batch"}, (0, 3, 4), None, True, "`x` must have more than one value per channel"),
    ],
)
def test_sizes_unknown_to_the_trace_are_checked_when_it_runs(options, shape, mask, training, words):
    block = NonLocalBlock(4, **options)
    unknown = tf.TensorSpec([None] * (len(shape) - 1) + [4])
    masked = [] if mask is None else [tf.TensorSpec([None] * (len(shape) - 1), tf.bool)]
    traced = tf.function(
        lambda x, *key_mask: block(x, *key_mask, training=training), input_signature=[unknown, *masked]
    )
    arguments = [tf.ones(shape)] if mask is None else [tf.ones(shape), tf.ones(mask, tf.bool)]
    before = block.export_params()
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        traced(*arguments)
    assert all(np.array_equal(a, before[name]) for name, a in block.export_params().items())
