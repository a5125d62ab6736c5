"""Blocks of Keras on their way to production: SavedModel, `.keras`, and norms folded away."""

import importlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import nonlocal_core as nlc
import nonlocal_tensorflow
from nonlocal_tensorflow import NonLocalBlock, attention_of, insert_nonlocal

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")

# Keras gives its own weights to NumPy in the old way when it writes them into a file.
writes_a_file = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def random_input(*shape, dtype="float32"):
    return np.random.default_rng(1).normal(size=shape).astype(dtype)


def filled(block):
    """Give every parameter of a block a value that is not the one it starts with."""
    rng = np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, a.shape) for name, a in block.export_params().items()})
    return block


def model_of(block):
    """Return a network with a mask, in which nothing is known but the channels."""
    x, mask = keras.Input((None, None, 6), name="x"), keras.Input((None, None), dtype="bool", name="mask")
    return keras.Model([x, mask], block(x, key_mask=mask))


def export_by_keras(model, path):
    model.export(path, verbose=False)
    loaded = tf.saved_model.load(path)
    return lambda arrays: loaded.serve(arrays)  # noqa: PLW0108 - the function alone does not keep its variables


def export_by_tensorflow(model, path):
    signature = [tf.TensorSpec(a.shape, a.dtype, name=a.name) for a in model.inputs]
    serve = tf.function(lambda x, mask: model([x, mask]), input_signature=signature)
    tf.saved_model.save(model, path, signatures={"serve": serve})
    loaded = tf.saved_model.load(path)
    return lambda arrays: loaded.signatures["serve"](x=tf.constant(arrays[0]), mask=tf.constant(arrays[1]))["output_0"]


def loaded_by_keras(model, path):
    model.save(path.with_suffix(".keras"))
    return keras.models.load_model(path.with_suffix(".keras"))


@writes_a_file
@pytest.mark.parametrize(
    ("export", "pairwise"),
    [
        *((loaded_by_keras, pairwise) for pairwise in FORMS),
        # Both write what TensorFlow traced: each form once.
        *((export_by_keras, pairwise) for pairwise in ("embedded_gaussian", "concatenation")),
        *((export_by_tensorflow, pairwise) for pairwise in ("gaussian", "dot_product")),
    ],
)
def test_what_was_exported_serves_other_batches_sizes_and_masks(tmp_path, export, pairwise):
    block = filled(NonLocalBlock(6, pairwise=pairwise, subsample=(2, 1), norm="batch"))
    serve, params = export(model_of(block), tmp_path / "model"), block.export_params()
    for shape in [(2, 5, 7), (3, 4, 6)]:
        x, mask = random_input(*shape, 6), np.random.default_rng(2).random(shape) < 0.6
        z = np.asarray(serve([x, mask]))
        expected = nlc.nonlocal_block(x.astype("float64"), params, block.spec, mask)
        np.testing.assert_allclose(z, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@writes_a_file
def test_a_network_with_inserted_blocks_is_exported(tmp_path):
    plain = keras.Sequential(
        [keras.Input((None, None, 3)), layers.Conv2D(6, 3, name="conv"), layers.GlobalAveragePooling2D()]
    )
    model, (insertion,) = insert_nonlocal(plain, ["conv"], subsample=2, norm="batch", pairwise="dot_product")
    filled(model.get_layer(insertion.name))
    serve = export_by_keras(model, tmp_path / "model")
    for shape in [(2, 9, 7, 3), (1, 8, 10, 3)]:
        x = random_input(*shape)
        expected = model(x).numpy()
        np.testing.assert_allclose(serve(x), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        assert not np.allclose(plain(x), expected)


def test_a_network_that_version_0_1_0_wrote_is_loaded_and_computes_what_it_did():
    saved = Path(__file__).parent / "saved"
    model = keras.models.load_model(saved / "tensorflow.keras")
    block, stored = model.get_layer("relu_nonlocal_block"), np.load(saved / "tensorflow.npz")
    params = {name: stored[name] for name in stored.files if name not in {"x", "z"}}
    assert isinstance(block, NonLocalBlock)
    assert all(np.array_equal(a, params[name]) for name, a in block.export_params().items())
    np.testing.assert_allclose(model(stored["x"]), stored["z"], rtol=1e-6, atol=1e-6)
    relu = np.maximum(stored["x"], 0).astype("float64")
    expected = nlc.nonlocal_block(relu, params, block.spec).reshape(2, -1)
    np.testing.assert_allclose(model(stored["x"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("block", "NonLocalBlock"),
        ("insert", "insert_nonlocal"),
        ("insert", "remove_nonlocal"),
        ("network", "attention_of"),
        ("network", "check_identity"),
        ("norm", "BatchNorm"),
        ("op", "nonlocal_op"),
    ],
)
def test_what_a_pickle_of_version_0_1_0_names_is_found_there(module, name):
    found = getattr(importlib.import_module(f"nonlocal_tensorflow.{module}"), name)
    assert found is getattr(nonlocal_tensorflow, name, nonlocal_tensorflow.norm.BatchNorm)


# Norms folded away


@pytest.mark.parametrize("norm", ["batch", "affine"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 11, 6), (2, 5, 7, 6), (2, 4, 5, 3, 6)], ids=["1d", "2d", "3d"])
def test_a_folded_norm_computes_the_same(norm, bias, shape):
    block = filled(NonLocalBlock(6, norm=norm, bias=bias, subsample=2, pairwise="concatenation", dtype="float64"))
    folded, x = block.fold_norm(), random_input(*shape, dtype="float64")
    assert (folded.spec.norm, folded.spec.bias["out"], folded.norm) == (None, True, None)
    expected = block(x)
    np.testing.assert_allclose(folded(x), expected, rtol=1e-12)
    np.testing.assert_array_equal(block(x), expected)
    np.testing.assert_array_equal(folded.attention(x), block.attention(x))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16", "float64"])
def test_a_folded_block_is_the_same_layer_in_all_else(policy):
    options = {
        "inner_channels": 2,
        "method": "sorted",
        "data_format": "channels_first",
        "trainable": False,
        "autocast": False,
    }
    block = NonLocalBlock(6, pairwise="concatenation", norm="batch", name="own", dtype=policy, **options)
    folded = filled(block).fold_norm()
    assert folded.get_config() == block.get_config() | {"norm": None}
    assert {weight.dtype for weight in folded.weights} == {block.out.kernel.dtype}
    assert not {id(weight) for weight in folded.weights} & {id(weight) for weight in block.weights}


def test_folded_blocks_take_their_places_in_a_network():
    plain = keras.Sequential([keras.Input((5, 7, 3)), layers.Conv2D(6, 3, name="conv"), layers.ReLU()])
    model, (insertion,) = insert_nonlocal(plain, ["conv"], norm="batch")
    filled(model.get_layer(insertion.name))
    folded = keras.models.clone_model(
        model, clone_function=lambda layer: layer.fold_norm() if isinstance(layer, NonLocalBlock) else layer
    )
    x = random_input(2, 5, 7, 3)
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert folded.get_layer(insertion.name).spec.norm is None
    np.testing.assert_array_equal(attention_of(folded, x, "conv").weights, attention_of(model, x, "conv").weights)


def test_a_block_without_norm_or_parameters_has_nothing_to_fold():
    with pytest.raises(ValueError, match=r"`norm` must be 'batch' or 'affine' to be folded\. Got None"):
        NonLocalBlock(6).fold_norm()
    with pytest.raises(ValueError, match="`channels` must be given, or the block built, before it has parameters"):
        NonLocalBlock(norm="batch").fold_norm()
