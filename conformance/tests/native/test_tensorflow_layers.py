"""What users of Keras hang on the layers of a block, put in their places, and spread over devices."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import nonlocal_core as nlc
from nonlocal_tensorflow import NonLocalBlock, check_identity, insert_nonlocal

LINEAR = ("theta", "phi", "g", "out")

# Keras gives its own weights to NumPy in the old way.
gives_weights = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def filled_block(**options):
    """Return a block for 6 channels, no parameter of which is zero."""
    block, rng = NonLocalBlock(6, **options), np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, a.shape) for name, a in block.export_params().items()})
    return block


def random_input(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def assert_near(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def with_lora(block, name):
    getattr(block, name).enable_lora(2)
    getattr(block, name).lora_kernel_b.assign(np.full(getattr(block, name).lora_kernel_b.shape, 0.1))


def doubled(block, name):
    setattr(block, name, keras.Sequential([getattr(block, name), keras.layers.Rescaling(2.0)]))


def active(block, name):
    getattr(block, name).activation = keras.activations.tanh


def quantised(block, name):
    getattr(block, name).quantize("int8")


@pytest.mark.parametrize("norm", [None, "batch", "affine"])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("change", [with_lora, doubled, active])
def test_what_is_hung_on_a_layer_acts_in_every_call(change, name, norm):
    block, x = filled_block(norm=norm, subsample=2), random_input(2, 5, 7, 6)
    params = block.export_params()
    before = {training: block(x, training=training) for training in (False, True)}
    rows = block.attention(x, [3, 1])
    block.import_params(params)
    change(block, name)
    for training in (False, True):
        assert not np.allclose(block(x, training=training), before[training], atol=1e-3 if norm != "batch" else 1e-6)
    assert np.allclose(block.attention(x, [3, 1]), rows, atol=1e-4) == (name in {"g", "out"})


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("norm", [None, "batch", "affine"])
def test_with_lora_a_block_computes_and_exports_what_its_layers_do(norm, policy):
    block, x = filled_block(norm=norm, dtype=policy), random_input(2, 5, 7, 6)
    for name in LINEAR:
        with_lora(block, name)
    tolerance = 1e-5 if policy == "float32" else 0.05
    for merged, spec in [(block.export_params(), block.spec), *([] if norm is None else [folded_of(block)])]:
        expected = nlc.nonlocal_block(x.astype("float64"), merged, spec)
        assert np.abs(tf.cast(block(x), "float64") - expected).max() < tolerance * np.abs(expected).max()
    with pytest.raises(ValueError, match=r"`theta` must be without LoRA, for its weights to be written\. Got rank 2"):
        block.import_params(block.export_params())


def folded_of(block):
    folded = block.fold_norm()
    return folded.export_params(), folded.spec


def test_with_lora_the_matrices_of_low_rank_train_alone():
    block, x = filled_block(), random_input(2, 9, 6)
    for name in LINEAR:
        with_lora(block, name)
        getattr(block, name).bias.trainable = False
    model = keras.Sequential([block])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    before = block.get_weights()
    model.fit(x, x, verbose=0)
    moved = {
        weight.path.split("/")[-1]
        for weight, old in zip(block.weights, before, strict=True)
        if not np.array_equal(weight.numpy(), old)
    }
    assert moved == {"lora_kernel_a", "lora_kernel_b"}


def each_layer(model):
    for name in LINEAR:
        getattr(model.layers[0], name).quantize("int8")


def the_block(model):
    model.layers[0].quantize("int8")


def the_model(model):
    model.quantize("int8")


@gives_weights
@pytest.mark.filterwarnings("ignore:Layer (BatchNorm|InputLayer) does not have a `quantize` method:UserWarning")
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("quantize", [each_layer, the_block, the_model])
def test_a_quantised_network_computes_in_eight_bits_and_says_that_it_cannot_be_exported(quantize, norm):
    block, x = filled_block(norm=norm), random_input(2, 5, 7, 6)
    model = keras.Sequential([keras.Input((None, None, 6)), block])
    expected = model(x)
    quantize(model)
    assert {getattr(block, name).kernel.dtype for name in LINEAR} == {"int8"}
    largest = np.abs(expected).max()
    assert 1e-6 * largest < np.abs(model(x) - expected).max() < 0.05 * largest
    with pytest.raises(ValueError, match=r"`theta` must be a keras\.layers\.Dense, linear and not quantised"):
        block.export_params()


@gives_weights
@pytest.mark.parametrize("change", [with_lora, doubled, quantised])
@pytest.mark.parametrize("channels", [6, None])
def test_a_changed_layer_is_saved_and_loaded(tmp_path, change, channels):
    block = NonLocalBlock(channels, norm="batch", subsample=2)
    model, x = keras.Sequential([keras.Input((None, None, 6)), block]), random_input(2, 5, 7, 6)
    rng = np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, a.shape) for name, a in block.export_params().items()})
    for name in ("theta", "out"):
        change(block, name)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_near(loaded(x), model(x))
    assert len(loaded.weights) == len(model.weights)


GIVEN = {
    "kernel_initializer": keras.initializers.RandomUniform(0.1, 0.2),
    "bias_initializer": "ones",
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "bias_regularizer": "l1",
    "kernel_constraint": keras.constraints.MaxNorm(0.5),
    "bias_constraint": "non_neg",
}


@gives_weights
@pytest.mark.parametrize("pairwise", ["gaussian", "concatenation"])
@pytest.mark.parametrize("channels", [6, None])
def test_the_layers_start_and_are_held_as_the_arguments_of_dense_say(tmp_path, pairwise, channels):
    block = NonLocalBlock(channels, pairwise=pairwise, zero_init=False, **GIVEN)
    model, x = keras.Sequential([keras.Input((5, 6)), block]), random_input(2, 5, 6)
    layers = [layer for name in LINEAR if (layer := getattr(block, name)) is not None]
    assert len(layers) == {"gaussian": 2, "concatenation": 4}[pairwise]
    assert all(0.1 <= np.min(layer.kernel) < np.max(layer.kernel) <= 0.2 for layer in layers)
    assert len({float(layer.kernel[0, 0]) for layer in layers}) == len(layers)
    assert all(np.all(layer.bias == 1) for layer in layers)
    expected = sum(0.1 * np.sum(np.square(layer.kernel)) + 0.01 * layer.bias.shape[0] for layer in layers)
    assert_near(sum(model.losses), expected)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(x, -x, verbose=0)
    assert all(np.max(np.linalg.norm(layer.kernel, axis=0)) < 0.501 for layer in layers)
    assert all(np.min(layer.bias) >= 0 for layer in layers)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_near(loaded(x), model(x))
    assert_near(sum(loaded.losses), sum(model.losses))
    assert loaded.layers[0].get_config() == block.get_config()
    assert "layers" not in block.get_config()


def test_what_is_given_for_the_layers_goes_wherever_a_block_is_made():
    made = [
        NonLocalBlock.from_spec(NonLocalBlock(6, norm="batch").spec, kernel_regularizer="l2"),
        insert_nonlocal(
            keras.Sequential([keras.Input((5, 6)), keras.layers.Dense(6, name="first")]),
            ["first"],
            kernel_regularizer="l2",
        )[0],
    ]
    for one in [*made, made[0].fold_norm()]:
        assert len(one.losses) == 4


@pytest.mark.parametrize("norm", [None, "batch", "affine"])
def test_a_block_that_starts_as_the_identity_does_so_whatever_its_layers_start_with(norm):
    block, x = NonLocalBlock(6, norm=norm, kernel_initializer="ones", bias_initializer="ones"), random_input(2, 5, 6)
    np.testing.assert_array_equal(block(x), x)
    assert np.all(block.theta.kernel == 1)
    assert np.any(block.out.kernel) == np.any(block.out.bias) == (norm is not None)
    plain = NonLocalBlock(6, kernel_initializer=None, bias_initializer=None)
    assert 0 < np.std(plain.theta.kernel) < 0.05
    with pytest.raises(TypeError, match=r"`kernel_regulariser` must be .*; the nearest is `kernel_regularizer`"):
        NonLocalBlock(6, kernel_regulariser="l2")


@pytest.mark.parametrize("method", ["pairwise", "sorted"])
def test_the_concatenation_calls_the_layers_in_the_place_of_its_own(method):
    block, x = filled_block(pairwise="concatenation", method=method, subsample=2), tf.constant(random_input(2, 5, 7, 6))
    params = {
        name: a if name.startswith("concat") else (1 + LINEAR.index(name.partition(".")[0])) * a
        for name, a in block.export_params().items()
    }
    for factor, name in enumerate(LINEAR, start=1):
        setattr(block, name, keras.Sequential([getattr(block, name), keras.layers.Rescaling(float(factor))]))
    with tf.GradientTape() as tape:
        tape.watch(x)
        z = block(x)
    dx, _ = nlc.nonlocal_block_vjp(x.numpy().astype("float64"), params, block.spec, np.ones(x.shape))
    assert_near(z, nlc.nonlocal_block(x.numpy().astype("float64"), params, block.spec))
    assert_near(tape.gradient(z, x), dx, 1e-4)
    assert_near(block.attention(x, [3, 1]), nlc.attention(x.numpy().astype("float64"), params, block.spec, [3, 1]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_running_statistics_of_called_layers_move_by_the_momentum_of_the_norm(own, masked):
    block, x = filled_block(norm="batch", norm_momentum=0.3), random_input(2, 5, 7, 6)
    params, spec = block.export_params(), block.spec
    doubled(block, "out")
    if not own:
        block.norm = keras.layers.BatchNormalization(momentum=0.4, epsilon=1e-5)
        block.norm.set_weights([params[f"norm.{name}"] for name in ("weight", "bias", "mean", "variance")])
        spec = spec.replace(norm_momentum=0.6)
    params |= {name: 2 * params[name] for name in ("out.weight", "out.bias")}
    mask = np.random.default_rng(2).random((2, 5, 7)) < 0.6 if masked else None
    block(x, key_mask=mask, training=True)
    expected = nlc.updated_statistics(x.astype("float64"), params, spec, mask)
    assert_near(block.norm.moving_mean, expected["norm.mean"])
    assert_near(block.norm.moving_variance, expected["norm.variance"])


@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_in_the_place_of_another_is_asked_for_its_width_and_leaves_nothing_behind(name):
    block, x = filled_block(inner_channels=4, norm="batch"), random_input(2, 5, 6)
    block(x)
    leaving = 6 if name == "out" else 4
    with pytest.raises(ValueError, match=rf"`{name}` must be a layer that gives \(B, N, {leaving}\)"):
        setattr(block, name, keras.layers.Dense(7))
    with pytest.raises(TypeError, match=f"`{name}` must be a keras.Layer"):
        setattr(block, name, abs)
    other = keras.layers.Dense(leaving, kernel_regularizer="l2", kernel_constraint="non_neg", name="other")
    setattr(block, name, other)
    assert len(block.weights) == 12
    np.testing.assert_allclose(sum(block.losses), 0.01 * np.sum(np.square(other.kernel)), rtol=1e-5)
    model = keras.Sequential([block])
    model.compile(keras.optimizers.SGD(10.0), "mse")
    model.fit(x, -x, verbose=0)
    assert np.min(other.kernel) >= 0
    assert keras.Sequential.from_config(model.get_config()).layers[0].get_config() == block.get_config()


def test_the_spectral_norm_of_keras_bounds_the_branch():
    block, x = filled_block(pairwise="gaussian"), random_input(2, 9, 6)
    block.out = keras.layers.SpectralNormalization(block.out, power_iterations=20)
    block(x, training=True)
    assert np.linalg.norm(block.out.layer.kernel, 2) == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match=r"`out` must be a keras\.layers\.Dense, .* Got <SpectralNormalization"):
        check_identity(block)


class Positions(keras.Layer):
    """Scores with a learned bias for each pair of positions."""

    def build(self, theta_shape, phi_shape):
        self.bias = self.add_weight(shape=(theta_shape[1], phi_shape[1]), initializer="zeros", name="bias")

    def call(self, theta, phi):
        return keras.ops.matmul(theta, keras.ops.swapaxes(phi, 1, 2)) + self.bias


@gives_weights
@pytest.mark.parametrize("channels", [6, None])
def test_a_layer_that_scores_pairs_is_registered_trains_and_is_saved(tmp_path, channels):
    block = NonLocalBlock(channels, pairwise=Positions(), normalize="softmax", subsample=2, zero_init=False)
    model, x = keras.Sequential([keras.Input((4, 6, 6)), block]), random_input(2, 4, 6, 6)
    assert block.pairwise.bias.shape == (24, 6)
    assert any(weight is block.pairwise.bias for weight in block.trainable_weights)
    twin = NonLocalBlock(6, subsample=2)
    twin.import_params(block.export_params())
    assert_near(block(x), twin(x))
    model.compile("adam", "mse")
    model.fit(x, np.flip(x, 1), verbose=0)
    assert np.any(block.pairwise.bias)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects={"Positions": Positions})
    assert_near(loaded(x), model(x))


@pytest.mark.parametrize("options", [{}, {"axes": "space", "subsample": 2}, {"group_size": 2}])
def test_a_layer_that_scores_pairs_sees_whole_sets_in_the_attention_to_chosen_positions(options):
    block, x = filled_block(pairwise=Positions(), normalize="softmax", **options), random_input(2, 4, 5, 3, 6)
    mask = np.random.default_rng(2).random((2, 4, 5, 3)) < 0.6
    block(x)
    block.pairwise.bias.assign(np.random.default_rng(3).normal(size=block.pairwise.bias.shape))
    params, bias = block.export_params(), block.pairwise.bias.numpy().astype("float64")
    spec = block.spec.replace(pairwise=lambda theta, phi: theta @ phi.mT + bias)
    for key_mask in (None, mask):
        expected = nlc.attention(x.astype("float64"), params, spec, key_mask=key_mask)
        assert_near(block.attention(x, key_mask=key_mask), expected)
        assert_near(block.attention(x, [57, 0, 31], key_mask), expected[:, [57, 0, 31]])


def test_whether_statistics_are_synchronised_is_kept():
    block = NonLocalBlock(6, norm="batch", synchronized=True)
    assert NonLocalBlock.from_config(block.get_config()).norm.synchronized
    assert not NonLocalBlock(6, norm="batch").norm.synchronized


@gives_weights
@pytest.mark.parametrize(("imports", "words"), [("keras", "import nonlocal_tensorflow"), ("nonlocal_tensorflow", None)])
def test_a_new_process_is_told_what_to_import_before_it_loads_a_network(tmp_path, imports, words):
    model = keras.Sequential([keras.Input((5, 6)), NonLocalBlock(norm="batch")])
    model.save(tmp_path / "model.keras")
    assert "layers" not in model.layers[0].get_config()
    code = f"import keras, {imports}; keras.models.load_model({str(tmp_path / 'model.keras')!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, words is None or words in ran.stderr) == (int(words is not None), True)


class TwiceNorm(keras.layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize("read", ["export_params", "fold_norm"])
def test_a_norm_that_computes_something_else_than_its_parameters_say_is_called_and_refused_by_name(read):
    block, x = filled_block(norm="batch"), random_input(2, 5, 6)
    norm, plain = TwiceNorm(), block(x) - x
    norm.build((None, None, 6))
    norm.set_weights(block.norm.get_weights())
    norm.epsilon, block.norm = block.norm.epsilon, norm
    np.testing.assert_allclose(block(x) - x, 2 * plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`norm` must be a keras\.layers\.BatchNormalization for its parameters"):
        getattr(block, read)()
