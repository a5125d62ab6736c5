"""Attention by a kernel of JAX, on a CPU: in place of cuDNN's a function that takes no more than that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_core as nlc
from nonlocal_jax import nonlocal_op, op
from nonlocal_jax.methods import fused

pytestmark = pytest.mark.usefixtures("_compile_fast")

UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
CASES = [  # B, N, M, C', D, the scale, whether there is a mask, and the dtype
    ((2, 70, 50, 12, 20), 0.3, False, "bfloat16"),
    ((2, 9, 7, 24, 5), -0.4, True, "bfloat16"),
    ((2, 9, 7, 5, 24), -0.4, False, "float16"),
    ((1, 2, 1, 1, 1), 1.0, True, "float16"),
]


@jax.custom_vjp
def kernel(query, key, value, lengths, scale):
    return forward(query, key, value, lengths, scale)[0]


def forward(*given):
    query, key, value, lengths, scale = given
    weights = jax.nn.softmax(scores_of(query, key, lengths, scale))
    y = jnp.einsum("btns,bsnh->btnh", weights.astype(query.dtype), value, preferred_element_type=jnp.float32)
    return y.astype(query.dtype), given


def scores_of(query, key, lengths, scale):
    scores = scale * jnp.einsum("btnh,bsnh->btns", query, key, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(key.shape[1]) < lengths[:, None, None, None], scores, -jnp.inf)


@jax.custom_jvp
def only_once(dy):
    return dy


@only_once.defjvp
def only_once_jvp(*_):
    message = "cuDNN has no second derivative"
    raise NotImplementedError(message)


def backward(given, dy):
    *arrays, lengths, scale = given
    arrays, dy = jax.tree.map(only_once, (arrays, dy))
    _, pull = jax.vjp(lambda *arrays: forward(*arrays, lengths, scale)[0], *arrays)
    return *pull(dy), None, None


kernel.defvjp(forward, backward)


@pytest.fixture
def calls(monkeypatch):
    """Let the adapter take this machine for one with a GPU, and return what the kernel gets."""
    found = []

    def checked(query, key, value, *, scale, key_value_seq_lengths):
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[0] == key.shape[0]
        assert query.shape[2:] == key.shape[2:]
        assert key.shape == value.shape
        assert query.shape[1] % 2 == key.shape[1] % 2 == query.shape[3] % 8 == 0
        assert scale > 0
        found.append(query.shape)
        lengths = jnp.full(key.shape[0], key.shape[1]) if key_value_seq_lengths is None else key_value_seq_lengths
        return kernel(query, key, value, lengths, scale)

    monkeypatch.setattr(op, "device_kind", lambda: "gpu")
    monkeypatch.setattr(fused, "has_tensor_cores", lambda: True)
    monkeypatch.setattr(fused, "PLATFORM", "cpu")
    monkeypatch.setattr(fused, "KERNEL", checked)
    return found


def arrays_of(batch, queries, keys, inner, width, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, inner), (batch, keys, inner), (batch, keys, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def mask_of(batch, keys):
    """Return a mask with one key for the first sample, and none for the last of several."""
    mask = np.zeros((batch, keys), bool)
    mask[0, keys // 2] = True
    return mask


def gradients(function):
    """Return a function that gives the gradients of a loss that is not quadratic in the output."""
    return jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given).astype("float32"))), argnums=(0, 1, 2))


def slopes(function):
    """Return a function that gives the gradients of a weighted sum of gradients."""

    def total(*given):
        found = gradients(function)(*given)
        return sum(jnp.vdot(jnp.cos(1.0 * jnp.arange(a.size)), a.astype("float32").ravel()) for a in found)

    return jax.grad(total, argnums=(0, 1, 2))


def assert_close(actual, expected, dtype):
    """Compare relatively to the largest value of all, with 8 roundings."""
    actual, expected = ([np.asarray(a, "float64") for a in jax.tree.leaves(tree)] for tree in (actual, expected))
    scale = max(np.abs(a).max() for a in expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * UNITS[dtype] * scale)


@pytest.mark.parametrize(("sizes", "scale", "masked", "dtype"), CASES)
def test_the_kernel_gives_the_numbers_of_the_reference_and_their_derivatives(sizes, scale, masked, dtype, calls):
    given, mask = arrays_of(*sizes, dtype), mask_of(sizes[0], sizes[2]) if masked else None

    def everything(method):
        def function(*given):
            return nonlocal_op(*given, scale=scale, key_mask=mask, method=method)

        return jax.jit(lambda *given: (function(*given), gradients(function)(*given), slopes(function)(*given)))

    actual = everything("auto")(*given)
    assert calls
    assert actual[0].dtype == dtype
    expected = nlc.nonlocal_op(*(np.asarray(a, "float64") for a in given), scale=scale, key_mask=mask)
    assert_close(actual[0], expected, dtype)
    matrix = everything("pairwise")(*(a.astype("float32") for a in given))
    for found, wanted in zip(actual, matrix, strict=True):
        assert_close(found, wanted, dtype)


def test_a_batch_of_calls_is_one_of_more_samples(calls):
    given = arrays_of(3, 8, 6, 8, 8, "bfloat16")

    def of_sample(method):
        def function(theta, phi, g):
            return nonlocal_op(theta[None], phi[None], g[None], method=method)

        return jax.jit(jax.vmap(gradients(function), in_axes=(0, 0, None)))

    actual = of_sample("auto")(given[0], given[1], given[2][0])
    assert calls
    assert_close(actual, of_sample("pairwise")(given[0], given[1], given[2][0]), "bfloat16")


@pytest.mark.parametrize("without", ["GPU", "cuDNN", "sizes", "dtypes"])
def test_without_the_kernel_the_operation_takes_chunks(without, calls, monkeypatch):
    given = arrays_of(2, 0 if without == "sizes" else 9, 7, 4, 3, "bfloat16")
    if without == "GPU":
        monkeypatch.setattr(fused, "has_tensor_cores", lambda: False)
    if without == "cuDNN":
        monkeypatch.undo()
        monkeypatch.setattr(op, "device_kind", lambda: "gpu")
        monkeypatch.setattr(fused, "has_tensor_cores", lambda: True)
    if without == "dtypes":
        given[2] = given[2].astype("float32")
    found = nonlocal_op(*given, method="streamed")
    assert not calls
    wide = [a.astype("float32") for a in given]
    np.testing.assert_allclose(found.astype("float32"), nonlocal_op(*wide, method="pairwise"), atol=0.05)


def test_where_the_arrays_are_on_another_platform_the_chunks_compute(calls, monkeypatch):
    monkeypatch.setattr(fused, "PLATFORM", "cuda")
    given = arrays_of(2, 9, 7, 4, 3, "bfloat16")
    wide = [a.astype("float32") for a in given]
    assert_close(*(jax.jit(gradients(nonlocal_op))(*arrays) for arrays in (given, wide)), "bfloat16")
    assert calls
