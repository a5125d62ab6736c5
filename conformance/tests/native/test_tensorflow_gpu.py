"""What a GPU alone shows of the Keras adapter, beside `nonlocal conformance tensorflow --device cuda`."""

import numpy as np
import pytest
import tensorflow as tf

import nonlocal_core as nlc
from nonlocal_conformance.bounds import UNITS
from nonlocal_conformance.drivers.tensorflow import TensorflowDriver
from nonlocal_conformance.registry import bind
from nonlocal_tensorflow import nonlocal_op
from nonlocal_tensorflow.arrays import device

pytestmark = pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="needs a GPU that TensorFlow sees")
DEVICE = "cuda"
CHECKS = ("forward", "gradients", "second_derivatives", "compiled_training", "many_blocks", "memory")
MIXED = ("mixed_precision", "mixed_gradients", "mixed_attention", "large_scores", "score_digits", "long_sums")


@pytest.mark.parametrize("name", [*CHECKS, *MIXED])
def test_a_check_passes(name):
    chosen = [one for one in bind(TensorflowDriver(DEVICE)) if one.check.name == name]
    assert chosen
    for one in chosen:
        one()


def test_operands_are_on_the_gpu_and_the_plan_is_made_for_one():
    assert device() == "gpu"
    assert "GPU" in nonlocal_op(*[tf.ones((1, 8, 4))] * 3).device


def test_products_are_in_tf32_where_that_is_asked_for_alone():
    gpu = tf.config.list_physical_devices("GPU")[0]
    if tf.config.experimental.get_device_details(gpu)["compute_capability"] < (8, 0):
        pytest.skip("needs a GPU that has TF32")
    driver, eye = TensorflowDriver(DEVICE), np.eye(64, dtype="float32")
    x = np.random.default_rng(0).uniform(1, 2, (1, 64, 64)).astype("float32")
    spec = nlc.NonLocalSpec(channels=64, inner_channels=64, pairwise="dot_product", residual=False, bias=False)
    params = dict.fromkeys(nlc.param_shapes(spec), eye)
    expected = nlc.nonlocal_block(x.astype("float64"), params, spec)
    full, short = driver.block(spec, params, x)[0], driver.mixed(spec, params, x, "tensorfloat32")
    off, more = (np.abs(z - expected).max() / expected.max() for z in (full, short))
    assert off < 2.0**-20 < more < 8 * UNITS["tensorfloat32"]


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize(
    ("pairwise", "method"),
    [("embedded_gaussian", "streamed"), ("embedded_gaussian", "pairwise"), ("dot_product", "reassociated")],
)
def test_a_traced_step_in_bfloat16_gives_the_gradients_of_the_reference(pairwise, method, jit):
    rng = np.random.default_rng(0)
    arrays = {name: tf.cast(rng.normal(size=(2, 512, 64)), "bfloat16") for name in ("theta", "phi", "g", "dy")}
    options = {"pairwise": pairwise, "scale": 1 / 8}
    expected = nlc.nonlocal_op_vjp(**{n: tf.cast(a, "float64").numpy() for n, a in arrays.items()}, **options)

    @tf.function(jit_compile=jit)
    def step(dy, **operands):
        with tf.GradientTape() as tape:
            tape.watch(operands)
            y = nonlocal_op(**operands, **options, method=method)
        return tape.gradient(y, operands, dy)

    for name, found in step(**arrays).items():
        worst = np.abs(tf.cast(found, "float64") - expected[name]).max()
        assert worst <= 8 * UNITS["bfloat16"] * np.abs(expected[name]).max(), name
