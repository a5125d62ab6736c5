"""Blocks of Keras as TensorFlow Lite, and under the checks of TensorFlow for what is not finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import nonlocal_core as nlc
from nonlocal_tensorflow import NonLocalBlock

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
OPTIONS = [
    ((11,), {}),
    ((7, 30), {"subsample": 2, "norm": "batch", "data_format": "channels_first"}),
    ((4, 5, 3), {"subsample": (1, 2, 2), "subsample_at": "input", "axes": "space"}),
    ((4, 5, 3), {"group_size": 2, "norm": "affine", "subsample": 2}),
]


def filled(block):
    """Give every parameter of a block a value that is not the one it starts with."""
    rng = np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, a.shape) for name, a in block.export_params().items()})
    return block


def lite(converter):
    """Return what TensorFlow Lite runs of a converter."""
    interpreter = tf.lite.Interpreter(model_content=converter.convert())

    def run(*arrays):
        given = dict(zip(("x", "mask"), arrays, strict=True))
        places = {one["name"].partition(":")[0].split("_")[-1]: one["index"] for one in interpreter.get_input_details()}
        for name, place in places.items():
            interpreter.resize_tensor_input(place, given[name].shape)
        interpreter.allocate_tensors()
        for name, place in places.items():
            interpreter.set_tensor(place, given[name])
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


is_old = pytest.mark.filterwarnings(r"ignore:\s*Warning. (tf.lite.Interpreter is|Please use the LiteRT):UserWarning")


@is_old
@pytest.mark.parametrize(("shape", "options"), OPTIONS, ids=["1d", "2d", "space", "groups"])
@pytest.mark.parametrize("pairwise", FORMS)
def test_tensorflow_lite_runs_every_form_with_unknown_sizes(pairwise, shape, options):
    block, sizes = filled(NonLocalBlock(6, pairwise=pairwise, **options)), (None,) * len(shape)
    first = block.data_format == "channels_first"
    x = keras.Input((6, *sizes) if first else (*sizes, 6), name="x")
    mask = keras.Input(sizes, dtype="bool", name="mask")
    model = keras.Model([x, mask], block(x, key_mask=mask))
    run = lite(tf.lite.TFLiteConverter.from_keras_model(model))
    rng = np.random.default_rng(1)
    for batch, grid in [(2, shape), (3, (shape[0] + 2, *shape[1:]))]:
        array, valid = rng.normal(size=(batch, *grid, 6)).astype("float32"), rng.random((batch, *grid)) < 0.6
        z = run(np.ascontiguousarray(np.moveaxis(array, -1, 1)) if first else array, valid)
        expected = nlc.nonlocal_block(array.astype("float64"), block.export_params(), block.spec, valid)
        found = np.moveaxis(z, 1, -1) if first else z
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@is_old
@pytest.mark.parametrize("pairwise", FORMS)
def test_tensorflow_lite_takes_a_function_with_a_masked_pooled_block(pairwise):
    block, rng = filled(NonLocalBlock(6, pairwise=pairwise, subsample=2)), np.random.default_rng(1)
    x, mask = rng.normal(size=(2, 7, 10, 6)).astype("float32"), rng.random((2, 7, 10)) < 0.6
    signature = [tf.TensorSpec([None, None, None, 6], name="x"), tf.TensorSpec([None] * 3, tf.bool, name="mask")]
    traced = tf.function(lambda x, mask: block(x, key_mask=mask), input_signature=signature)
    run = lite(tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()]))
    expected = nlc.nonlocal_block(x.astype("float64"), block.export_params(), block.spec, mask)
    np.testing.assert_allclose(run(x, mask), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.fixture
def _checked():
    """Let TensorFlow raise an error at the first number that is not finite."""
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


@pytest.mark.usefixtures("_checked")
@pytest.mark.parametrize("method", ["auto", "pairwise"])
@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_a_mask_makes_no_number_that_is_not_finite_on_the_way(pairwise, method, traced):
    block = filled(NonLocalBlock(6, pairwise=pairwise, method=method, subsample=2, norm="batch"))
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 6)).astype("float32")
    mask = np.zeros((2, 9, 10), bool)
    mask[0, :5] = mask[0, :, 7] = True  # and no key at all in the other sample

    def gradient(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = block(x, key_mask=mask, training=True)
        return tape.gradient(z, x)

    signature = [tf.TensorSpec([None, None, None, 6]), tf.TensorSpec([None, None, None], tf.bool)]
    call = tf.function(gradient, input_signature=signature) if traced else gradient
    assert np.isfinite(call(tf.constant(x), tf.constant(mask))).all()
