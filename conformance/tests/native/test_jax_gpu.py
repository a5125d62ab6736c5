"""What only a GPU shows: that cuDNN computes the softmax of half precision there, rightly and without the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_core as nlc
from nonlocal_jax import nonlocal_block, nonlocal_op
from nonlocal_jax.arrays import device_kind, has_tensor_cores

if device_kind() == "cpu" or not has_tensor_cores():
    pytest.skip("needs a GPU that JAX sees", allow_module_level=True)

UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def arrays_of(batch, queries, keys, inner, width, dtype):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, inner), (batch, keys, inner), (batch, keys, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def step(given, **options):
    """Return a compiled program of the output and the gradients."""

    def both(*given):
        y, pull = jax.vjp(lambda *given: nonlocal_op(*given, **options), *given)
        return y, pull(jnp.sin(y))

    return jax.jit(both).lower(*given).compile()


def slopes(given, **options):
    """Return the gradients of a weighted sum of gradients."""

    def total(*given):
        found = jax.grad(lambda *given: jnp.sum(jnp.sin(nonlocal_op(*given, **options))), argnums=(0, 1, 2))(*given)
        return sum(jnp.vdot(jnp.cos(1.0 * jnp.arange(a.size)), a.astype("float32").ravel()) for a in found)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*given)


def assert_close(actual, expected, dtype):
    """Compare leaf by leaf, relative to the largest value of all, with 8 roundings."""
    actual, expected = ([np.asarray(a, "float64") for a in jax.tree.leaves(tree)] for tree in (actual, expected))
    scale = max(np.abs(a).max() for a in expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * UNITS[dtype] * scale)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("sizes", "scale"),
    [((2, 512, 384, 64, 64), 0.1), ((3, 49, 33, 12, 20), -0.4), ((1, 2, 1, 1, 1), 1.0), ((2, 256, 128, 128, 96), 0.1)],
)
def test_cudnn_gives_the_numbers_of_the_reference_and_their_derivatives(sizes, scale, masked, dtype):
    given, options = arrays_of(*sizes, dtype), {"scale": scale}
    if masked:
        mask = np.random.default_rng(1).random((sizes[0], sizes[2])) < 0.6
        mask[0] = np.arange(sizes[2]) == sizes[2] // 2
        mask[1:][-1:] = False  # the last of several samples has no key
        options["key_mask"] = mask
    program = step(given, **options)
    assert "__cudnn$fmhaSoftmaxBackward" in program.as_text()
    y, gradients = program(*given)
    wide = [a.astype("float32") for a in given]
    assert_close(y, nlc.nonlocal_op(*(np.asarray(a, "float64") for a in given), **options), dtype)
    assert_close(gradients, step(wide, method="pairwise", **options)(*wide)[1], dtype)
    assert_close(slopes(given, **options), slopes(wide, method="pairwise", **options), dtype)


def test_a_training_step_calls_each_kernel_once():
    text = step(arrays_of(2, 512, 384, 64, 64, "bfloat16")).as_text()
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_of_a_block_has_no_memory_for_the_matrix(masked):
    spec, positions = nlc.NonLocalSpec(channels=64), 8192
    params = {name: jnp.zeros(shape, "float32") for name, shape in nlc.param_shapes(spec).items()}
    mask = jnp.ones((1, positions), bool) if masked else None

    def loss(x, params):
        return jnp.sum(nonlocal_block(x, params, spec, mask, dtype="bfloat16") ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.zeros((1, positions, 64)), params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * positions**2 / 4


def test_a_batch_of_calls_is_one_call():
    theta, phi, g = arrays_of(3, 64, 32, 16, 16, "bfloat16")

    def of_sample(theta, phi, method="auto"):
        return nonlocal_op(theta[None], phi[None], g[:1], method=method)

    assert_close(
        jax.jit(jax.vmap(of_sample))(theta, phi),
        jax.vmap(lambda *given: of_sample(*given, method="pairwise"))(theta, phi),
        "bfloat16",
    )


def test_arrays_on_the_cpu_are_computed_there():
    given = [jax.device_put(a, jax.devices("cpu")[0]) for a in arrays_of(2, 20, 10, 8, 8, "bfloat16")]
    wide = [a.astype("float32") for a in given]
    assert_close(step(given)(*given), step(wide, method="pairwise")(*wide), "bfloat16")
