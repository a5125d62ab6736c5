"""Layers that stand in the place of a block's own, and a pairwise form that is a module."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nonlocal_core as nlc
from nonlocal_jax import NonLocalBlock, check_identity, nonlocal_block

SHAPE = (2, 3, 4, 6)
LAYERS = ("theta", "phi", "g", "out")


pytestmark = pytest.mark.usefixtures("_compile_fast")


def random_block(**options):
    """Return a block whose every parameter is random."""
    block, rng = NonLocalBlock(6, rngs=nnx.Rngs(0), **options), np.random.default_rng(0)
    shapes = nlc.param_shapes(block.spec)
    block.import_params({name: rng.uniform(0.1, 1.1, shape).astype("float32") for name, shape in shapes.items()})
    return block


def random_input(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def sizes(name):
    return (3, 6) if name == "out" else (6, 3)


def around(name, layer):
    """Return LoRA around a layer, whose own part is not 0."""
    (entering, leaving), rngs = sizes(name), nnx.Rngs(1)
    ones = nnx.initializers.ones
    return nnx.LoRA(entering, 2, leaving, base_module=layer, b_initializer=ones, rngs=rngs)


def instead(name, layer):
    """Return a linear layer with LoRA in it, and the parameters of another."""
    options = {"lora_rank": 2, "b_initializer": nnx.initializers.ones, "rngs": nnx.Rngs(2)}
    new = nnx.LoRALinear(*sizes(name), **options)
    new.kernel, new.bias = layer.kernel, layer.bias
    return new


class Scaled(nnx.Module):
    """A wrapper that has no weights of its own."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, a):
        return 2 * self.layer(a)


def assert_close(actual, expected, rtol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "concatenation"])
@pytest.mark.parametrize("change", [around, instead])
@pytest.mark.parametrize("name", LAYERS)
def test_lora_acts_in_the_output_in_attention_and_in_what_is_exported(name, change, pairwise):
    block, x = random_block(pairwise=pairwise, subsample=2, norm="affine"), random_input(*SHAPE)
    before = block.export_params()
    setattr(block, name, change(name, getattr(block, name)))
    params = block.export_params()
    changed = {key for key in params if not np.array_equal(params[key], before[key])}
    assert changed == {f"{name}.weight"}
    assert_close(block(x), nlc.nonlocal_block(x, params, block.spec))
    assert_close(block.attention(x, [1, 7]), nlc.attention(x, params, block.spec, [1, 7]))
    assert_close(block.fold_norm()(x), block(x))


def test_lora_alone_is_trained():
    block, x = random_block(), random_input(*SHAPE)
    for name in ("theta", "g"):
        layer = getattr(block, name)
        setattr(block, name, nnx.LoRA(6, 2, 3, base_module=layer, rngs=nnx.Rngs(1)))
    before = block.export_params()
    optimizer = nnx.Optimizer(block, optax.adam(0.05), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(block, optimizer):
        change = nnx.DiffState(0, nnx.LoRAParam)
        loss, gradients = nnx.value_and_grad(lambda block: jnp.mean(jnp.square(block(x))), argnums=change)(block)
        optimizer.update(block, gradients)
        return loss

    losses = [float(step(block, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    after = block.export_params()
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {"theta.weight", "g.weight"}


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "concatenation"])
@pytest.mark.parametrize("name", LAYERS)
def test_any_layer_is_called_and_an_export_says_which_it_cannot_read(name, pairwise):
    block, x = random_block(pairwise=pairwise), random_input(*SHAPE)
    params = block.export_params()
    setattr(block, name, Scaled(getattr(block, name)))
    doubled = {key: 2 * a if key.startswith(f"{name}.") else a for key, a in params.items()}
    assert_close(block(x), nlc.nonlocal_block(x, doubled, block.spec))
    assert_close(nnx.jit(lambda b, x: b.attention(x))(block, x), nlc.attention(x, doubled, block.spec))
    words = rf"`{name}` must be a flax.nnx.Linear, with or without LoRA, to be read\. Got Scaled"
    with pytest.raises(TypeError, match=words):
        block.export_params()
    with pytest.raises(TypeError, match=words):
        check_identity(nnx.Sequential(block))


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("theta", partial(around, "theta"), r"`theta` must be a flax.nnx.Linear to be written to\. Got LoRA\."),
        ("norm", lambda _: nnx.LayerNorm(6, rngs=nnx.Rngs(0)), r"`norm` must be the dict that the block has made"),
    ],
)
def test_an_import_says_to_which_layer_it_cannot_write_and_writes_to_none(name, layer, words):
    block = random_block(norm="affine")
    params, theta = block.export_params(), block.g.kernel[...]
    setattr(block, name, layer(getattr(block, name)))
    with pytest.raises(TypeError, match=words):
        block.import_params({key: 2 * a for key, a in params.items()})
    assert np.array_equal(block.g.kernel[...], theta)


def test_another_norm_is_called():
    block, x = random_block(norm="batch", residual=False), random_input(*SHAPE)
    block.norm = nnx.LayerNorm(6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.var(block(x), axis=-1), 1, rtol=1e-2)


def test_what_stands_in_the_place_of_the_concatenation_is_refused_by_name():
    block = random_block(pairwise="concatenation")
    params = block.export_params()
    block.concat = nnx.Linear(6, 1, rngs=nnx.Rngs(0))
    for use in (lambda: block(random_input(*SHAPE)), block.export_params, lambda: block.import_params(params)):
        with pytest.raises(TypeError, match=r"`concat` must be the dict that the block has made\. Got Linear\."):
            use()


def test_a_linear_layer_with_a_dtype_of_its_own_computes_in_it():
    block, x = random_block(), random_input(*SHAPE)
    plain, other = block(x), nnx.Linear(6, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    other.kernel, other.bias = block.g.kernel, block.g.bias
    block.g = other
    assert block(x).dtype == jnp.float32
    assert 1e-4 < np.abs(block(x) - plain).max() / np.abs(plain).max() < 2e-2


def test_a_layer_of_another_width_is_refused_by_name():
    block = random_block()
    block.phi = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"`phi` must have shape \(2, 3, 4, 3\)\. Got shape \(2, 3, 4, 4\)"):
        block(random_input(*SHAPE))


def test_a_pickle_of_version_0_1_0_has_its_projections_as_dicts():
    block, x = random_block(norm="batch"), random_input(*SHAPE)
    twin = nnx.clone(block)
    for name in LAYERS:
        layer = getattr(twin, name)
        setattr(twin, name, nnx.Dict({"weight": nnx.Param(layer.kernel[...].T), "bias": nnx.Param(layer.bias[...])}))
    loaded = pickle.loads(pickle.dumps(twin))  # noqa: S301 - its own
    assert np.array_equal(loaded(x), block(x))
    assert jax.tree.structure(nnx.state(loaded)) == jax.tree.structure(nnx.state(block))


# A pairwise form that is a module


class Biased(nnx.Module):
    """The dot product and a learned number for each pair of places."""

    def __init__(self, queries, keys):
        self.bias = nnx.Param(np.random.default_rng(3).normal(size=(queries, keys)).astype("float32"))

    def __call__(self, theta, phi):
        return theta @ phi.mT + self.bias[...]


@pytest.mark.parametrize(
    ("options", "places"),
    [({}, (12, 12)), ({"subsample": (1, 2)}, (12, 6)), ({"axes": (1,)}, (4, 4)), ({"norm": "batch"}, (12, 12))],
)
def test_a_module_is_registered_trained_saved_and_known_to_attention(options, places):
    block = random_block(pairwise=Biased(*places), normalize="softmax", **options)
    x, bias = random_input(*SHAPE), block.pairwise.bias[...]

    def biased(theta, phi):
        return theta @ np.swapaxes(phi, 1, 2) + bias

    block.eval()
    spec = block.spec.replace(pairwise=biased)
    assert_close(block(x), nlc.nonlocal_block(x, block.export_params(), spec))
    rows = block.attention(x)
    np.testing.assert_allclose(np.sum(rows, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(block.attention(x, [5, 0]), rows[:, [5, 0]], rtol=1e-5)
    gradients = nnx.grad(lambda block: jnp.sum(jnp.square(block(x))))(block)
    assert np.abs(gradients["pairwise"]["bias"][...]).max() > 0
    graph, state = nnx.split(block)
    twin = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    nnx.update(twin, state)
    assert np.array_equal(twin(x), block(x))
    if block.spec.norm is not None:
        assert_close(block.fold_norm()(x), block(x))


def test_rows_of_a_function_are_those_with_which_the_keys_are_summed():
    block = random_block(pairwise=Biased(4, 2), normalize="count", axes=(1,), subsample=2, residual=False)
    x, params, mask = random_input(*SHAPE), block.export_params(), np.ones(SHAPE[:-1], bool)
    mask[:, :, 2:] = False
    rows = np.asarray(block.attention(x, key_mask=mask))
    g = x @ params["g.weight"].T + params["g.bias"]
    g = g.reshape(2, 3, 2, 2, 3).max(axis=3).reshape(2, 6, 3)
    z = rows @ g @ params["out.weight"].T + params["out.bias"]
    assert_close(np.reshape(z, SHAPE), block(x, mask))


def test_a_static_spec_refuses_a_module_and_a_spec_without_its_module_says_so():
    block, x = random_block(pairwise=Biased(12, 12), normalize="softmax"), random_input(*SHAPE)
    spec = nlc.NonLocalSpec(channels=6, pairwise=block.pairwise, normalize="softmax")
    with pytest.raises(ValueError, match=r"`spec` must have a name or a function for `pairwise`.* Got Biased"):
        nonlocal_block(x, block.export_params(), spec)
    with pytest.raises(TypeError, match="`pairwise` must be given anew"):
        NonLocalBlock.from_spec(block.spec, rngs=nnx.Rngs(0))(x)


def test_equal_blocks_with_modules_are_traced_once():
    traces = []

    @nnx.jit
    def call(block, x):
        traces.append(block.spec)
        return block(x)

    for _ in range(2):
        call(random_block(pairwise=Biased(12, 12), normalize="softmax"), random_input(*SHAPE))
    assert len(traces) == 1
