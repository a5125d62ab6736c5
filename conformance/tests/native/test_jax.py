"""What JAX's and Flax's users expect of a function and of a module, beyond the numbers."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

import nonlocal_core as nlc
from nonlocal_conformance.sharded.jax import quick_options
from nonlocal_core.planning import exact_method
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_jax import NonLocalBlock, attention, nonlocal_block, nonlocal_op, updated_statistics

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")

# Every program here runs once or twice: with these options XLA compiles it several times faster.
jit = partial(jax.jit, compiler_options=quick_options())


pytestmark = pytest.mark.usefixtures("_compile_fast")


@pytest.fixture
def x64():
    with jax.enable_x64(True):  # noqa: FBT003 - it has no other form
        yield


def random_params(spec, dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.1, 1.1, shape).astype(dtype) for name, shape in nlc.param_shapes(spec).items()}


def random_input(*shape, dtype="float32"):
    return np.random.default_rng(1).normal(size=shape).astype(dtype)


def random_mask(*shape):
    """Return a mask whose last sample has no key at all."""
    mask = np.random.default_rng(2).random(shape) < 0.6
    mask[-1] = False
    return mask


def random_block(seed=0, **options):
    """Return a block whose every parameter is random."""
    block = NonLocalBlock(6, rngs=nnx.Rngs(seed), **options)
    block.import_params(random_params(block.spec))
    return block


def compiled(function, block, *args):
    """Return what a function of a block gives, which leaves the block itself as it is."""
    graph, state = nnx.split(block)
    return jit(lambda state, *args: function(nnx.merge(graph, state), *args))(state, *args)


def product(theta, phi):
    return theta @ phi.mT


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def square(z):
    return jnp.sum(jnp.square(z))


def assert_trees_close(actual, expected, rtol=1e-5):
    """Compare leaf by leaf, relative to the largest value of all: some gradients are zero by cancellation."""
    scale = max(np.abs(a).max() for a in jax.tree.leaves(as_numpy(expected)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=rtol * scale), as_numpy(actual), as_numpy(expected))


# The pure function


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pairwise", FORMS)
def test_the_function_gives_what_the_core_gives_on_jax_arrays(pairwise):
    spec = nlc.NonLocalSpec(channels=6, pairwise=pairwise, subsample=2, norm="batch")
    params, x, mask = random_params(spec, "float64"), random_input(3, 5, 7, 6, dtype="float64"), random_mask(3, 5, 7)
    arrays = jnp.asarray(x), jax.tree.map(jnp.asarray, params)
    expected = nlc.nonlocal_block(*arrays, spec, jnp.asarray(mask), training=True)
    assert isinstance(expected, jax.Array)
    z = nonlocal_block(*arrays, spec, mask, training=True)
    assert_trees_close(z, expected, rtol=1e-13)
    assert np.array_equal(nonlocal_block(x, params, spec, mask, training=True), z)


@pytest.mark.parametrize("training", [False, True])
def test_the_function_and_the_module_agree_to_the_bit(training):
    block, x, mask = random_block(norm="batch", subsample=2), random_input(3, 5, 7, 6), random_mask(3, 5, 7)
    block.set_attributes(use_running_average=not training)
    params = block.export_params()
    z = nonlocal_block(x, params, block.spec, mask, training)
    assert np.array_equal(block(x, mask), z)
    assert np.array_equal(block.attention(x, [3], mask), attention(x, params, block.spec, [3], mask))


def test_equal_specs_are_traced_once():
    traces = []

    def traced(x, params, spec):
        traces.append(spec)
        return nonlocal_block(x, params, spec)

    call, x = jax.jit(traced, static_argnums=2), random_input(3, 5, 7, 6)
    for options in ({"subsample": [1, 2]}, {"subsample": (1, 2), "inner_channels": np.int64(3)}):
        spec = nlc.NonLocalSpec(channels=6, **options)
        call(x, random_params(spec), spec)
    assert len(traces) == 1
    call(x, random_params(spec), spec.replace(scale=0.5))
    assert len(traces) == 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("training", [False, True])
def test_argnums_1_is_the_gradient_of_the_parameters_and_none_of_the_statistics(training):
    spec = nlc.NonLocalSpec(channels=6, norm="batch")
    params, x = random_params(spec, "float64"), random_input(3, 5, 7, 6, dtype="float64")

    def loss(x, params):
        return square(nonlocal_block(x, params, spec, training=training))

    gradients = jit(jax.grad(loss, argnums=1))(x, params)
    dz = 2 * nlc.nonlocal_block(x, params, spec, training=training)
    _, expected = nlc.nonlocal_block_vjp(x, params, spec, dz, training=training)
    assert {name: gradients.pop(name).any().item() for name in STATISTICS} == dict.fromkeys(STATISTICS, False)
    assert_trees_close(gradients, expected, rtol=1e-12)


def test_running_statistics_have_no_influence_in_training():
    spec = nlc.NonLocalSpec(channels=6, norm="batch")
    params, x = random_params(spec), random_input(3, 5, 7, 6)
    others = params | {name: params[name] + 1 for name in STATISTICS}
    z, moved = (nonlocal_block(x, p, spec, training=True) for p in (params, others))
    assert np.array_equal(z, moved)
    assert not np.allclose(*(nonlocal_block(x, p, spec) for p in (params, others)))


def test_vmap_over_samples_gives_the_gradients_of_each_alone():
    spec = nlc.NonLocalSpec(channels=6, pairwise="concatenation", subsample=2)
    params, x = random_params(spec), random_input(3, 5, 7, 6)
    gradient = jax.grad(lambda params, sample: square(nonlocal_block(sample[None], params, spec)))
    each, alone = jit(jax.vmap(gradient, in_axes=(None, 0)))(params, x), jit(gradient)
    for sample in range(3):
        assert_trees_close({name: a[sample] for name, a in each.items()}, alone(params, x[sample]))


def test_vmap_over_parameters_is_an_ensemble():
    spec = nlc.NonLocalSpec(channels=6, norm="batch")
    first, x = random_params(spec), random_input(3, 5, 7, 6)
    second = {name: a[::-1].copy() for name, a in first.items()}
    both = jax.tree.map(lambda *a: jnp.stack(a), first, second)
    z = jit(jax.vmap(lambda params: nonlocal_block(x, params, spec, training=True)))(both)
    for one, params in zip(z, (first, second), strict=True):
        assert_trees_close(one, nlc.nonlocal_block(x, params, spec, training=True))


def test_a_checkpoint_gives_the_same_gradients():
    spec = nlc.NonLocalSpec(channels=6, norm="batch", subsample=2)
    params, x = random_params(spec), random_input(3, 5, 7, 6)
    plain = partial(nonlocal_block, spec=spec, training=True)
    expected = jit(jax.grad(lambda p: square(plain(x, p))))(params)
    assert_trees_close(jit(jax.grad(lambda p: square(jax.checkpoint(plain)(x, p))))(params), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pairwise", FORMS)
def test_forward_mode_agrees_with_reverse_mode(pairwise):
    spec = nlc.NonLocalSpec(channels=6, pairwise=pairwise, subsample=2, norm="batch")
    params, x = random_params(spec, "float64"), random_input(3, 5, 7, 6, dtype="float64")

    def function(x):
        return nonlocal_block(x, params, spec, training=True)

    direction, dz = x[:, ::-1], x[:, :, ::-1]
    forward = jit(lambda x, v: jax.jvp(function, (x,), (v,))[1])(x, direction)
    (reverse,) = jit(lambda x, v: jax.vjp(function, x)[1](v))(x, dz)
    np.testing.assert_allclose(jnp.vdot(forward, dz), jnp.vdot(reverse, direction), rtol=1e-10)


@pytest.mark.parametrize("place", ["projection", "input"])
def test_of_equal_values_in_a_window_the_first_gets_the_gradient(place):
    spec = nlc.NonLocalSpec(channels=2, pairwise="gaussian", subsample=2, subsample_at=place, residual=False)
    params = random_params(spec)
    x = np.ones((1, 4, 4, 2), "float32")

    def loss(x):
        return square(nonlocal_block(x, params, spec) - 3)

    def keys_only(x):  # the queries stay as they are
        return loss(x) - jax.lax.stop_gradient(loss(x))

    dx = np.asarray(jit(jax.grad(keys_only))(x))
    expected, _ = nlc.nonlocal_block_vjp(x, params, spec, 2 * (nlc.nonlocal_block(x, params, spec) - 3))
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(dx[..., 0])) == 2


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_a_sample_without_keys_makes_no_nan_on_the_way(pairwise):
    spec = nlc.NonLocalSpec(channels=6, pairwise=pairwise, subsample=2, norm="batch")
    params, x, mask = random_params(spec), random_input(3, 5, 7, 6), random_mask(3, 5, 7)
    with jax.debug_nans(True):  # noqa: FBT003 - it has no other form
        z, gradients = jax.value_and_grad(
            lambda x, params: square(nonlocal_block(x, params, spec, mask, training=True)), argnums=(0, 1)
        )(x, params)
        rows = attention(x, params, spec, key_mask=mask)
    assert jax.tree.all(jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), (z, gradients)))
    assert not rows[-1].any()


def precisions(function, *args):
    """Return the precisions of the products in a function."""
    text = str(jax.make_jaxpr(function)(*args))
    return {line.strip() for line in text.splitlines() if "precision=" in line}, text.count("dot_general")


@pytest.mark.parametrize("pairwise", FORMS)
def test_products_are_full_float32_unless_the_user_says_otherwise(pairwise):
    spec = nlc.NonLocalSpec(channels=6, pairwise=pairwise)
    gradient = jax.grad(lambda x, params: square(nonlocal_block(x, params, spec)), argnums=(0, 1))
    args = random_input(3, 5, 7, 6), random_params(spec)
    found, count = precisions(gradient, *args)
    assert count >= 5
    assert found == {"precision=(Precision.HIGHEST, Precision.HIGHEST)"}
    with jax.default_matmul_precision("tensorfloat32"):
        assert precisions(gradient, *args) == ({"precision=(Precision.HIGH, Precision.HIGH)"}, count)


def test_updated_statistics_are_those_that_a_block_keeps():
    block, x = random_block(norm="batch", norm_momentum=0.3), random_input(3, 5, 7, 6)
    params = block.export_params()
    block(x)
    after = block.export_params()
    biased, unbiased = (updated_statistics(x, params, block.spec, unbiased=b) for b in (False, True))
    assert all(np.array_equal(after[name], biased[name]) for name in STATISTICS)
    old = 0.7 * params["norm.variance"]
    ratio = (unbiased["norm.variance"] - old) / (biased["norm.variance"] - old)
    np.testing.assert_allclose(ratio, 105 / 104, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pairwise", FORMS)
def test_who_forbids_implicit_promotion_of_ranks_and_dtypes_can_use_every_form(pairwise, dtype):
    options = {"method": exact_method(pairwise), "subsample": 2, "norm": "batch", "dtype": jnp.bfloat16}
    block, x, mask = random_block(pairwise=pairwise, **options), random_input(3, 5, 7, 6), random_mask(3, 5, 7)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients = nnx.jit(nnx.grad(lambda block, x: square(block(x, mask).astype("float32"))))(block, x.astype(dtype))
        rows = block.attention(x, [1], mask)
    assert rows.shape == (3, 1, 6)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(as_numpy(gradients)))


# Export

SIZES = {
    "b,n": ({}, True, [(2, 9), (3, 13)]),
    "b,h,w": ({"subsample": 2, "norm": "batch"}, False, [(2, 5, 7), (1, 9, 4)]),
    "b,t,h,w": ({"axes": "space", "subsample": 2, "subsample_at": "input"}, True, [(2, 2, 5, 4), (3, 3, 4, 6)]),
    "b,2*t,h,w": ({"group_size": 2, "subsample": (1, 2, 2)}, False, [(2, 4, 4, 5), (1, 2, 6, 5)]),
}


def exported(function, x, params, key_mask):
    """Return a function as it comes back from its bytes."""
    return jit(export.deserialize(export.export(jax.jit(function))(x, params, key_mask).serialize()).call)


@pytest.mark.parametrize("pairwise", FORMS)
def test_a_fixed_size_is_exported_and_comes_back(pairwise):
    spec = nlc.NonLocalSpec(channels=6, pairwise=pairwise, subsample=2)
    args = random_input(3, 5, 7, 6), random_params(spec), random_mask(3, 5, 7)
    call = exported(lambda x, params, mask: nonlocal_block(x, params, spec, mask), *args)
    assert_trees_close(call(*args), nlc.nonlocal_block(args[0], args[1], spec, args[2]))


# The sets are cut before a form sees them: two forms meet every size, and every form two sizes.
@pytest.mark.parametrize(
    ("pairwise", "names"),
    [
        ("gaussian", "b,n"),
        ("concatenation", "b,n"),
        ("embedded_gaussian", "b,h,w"),
        ("dot_product", "b,h,w"),
        ("dot_product", "b,t,h,w"),
        ("concatenation", "b,t,h,w"),
        ("gaussian", "b,2*t,h,w"),
        ("embedded_gaussian", "b,2*t,h,w"),
    ],
)
def test_symbolic_sizes_are_exported_with_gradients_and_freeze_no_number_of_keys(pairwise, names):
    options, masked, shapes = SIZES[names]
    spec = nlc.NonLocalSpec(channels=6, pairwise=pairwise, **options)
    params, sizes = random_params(spec), export.symbolic_shape(names)

    def function(x, params, mask):
        z, pull = jax.vjp(lambda *args: nonlocal_block(*args, spec, mask, training=True), x, params)
        return z, *pull(z)

    call = exported(
        function,
        jax.ShapeDtypeStruct((*sizes, 6), jnp.float32),
        params,
        jax.ShapeDtypeStruct(sizes, jnp.bool_) if masked else None,
    )
    for shape in shapes:
        x, mask = random_input(*shape, 6), random_mask(*shape) if masked else None
        z, dx, dparams = call(x, params, mask)
        expected = nlc.nonlocal_block(x, params, spec, mask, training=True)
        expected_dx, expected_dparams = nlc.nonlocal_block_vjp(x, params, spec, expected, mask, training=True)
        assert_trees_close((z, dx), (expected, expected_dx))
        assert_trees_close({name: dparams[name] for name in expected_dparams}, expected_dparams)


@pytest.mark.parametrize("positions", [None, [5, 0]])
def test_attention_is_exported_with_symbolic_sizes(positions):
    spec = nlc.NonLocalSpec(channels=6, subsample=2, axes=(1,))
    params, sizes = random_params(spec), export.symbolic_shape("b,h,w")
    arguments = jax.ShapeDtypeStruct((*sizes, 6), jnp.float32), params, jax.ShapeDtypeStruct(sizes, jnp.bool_)
    call = exported(lambda x, p, mask: attention(x, p, spec, positions, mask), *arguments)
    x, mask = random_input(3, 5, 7, 6), random_mask(3, 5, 7)
    assert_trees_close(call(x, params, mask), nlc.attention(x, params, spec, positions, mask))


def test_what_symbolic_sizes_leave_known_is_checked():
    spec = nlc.NonLocalSpec(channels=6, subsample=4)
    b, h = export.symbolic_shape("b,h")
    with pytest.raises(ValueError, match=r"`subsample` must leave at least one window on spatial axis 1\. Got size 3"):
        export.export(jax.jit(partial(nonlocal_block, spec=spec)))(
            jax.ShapeDtypeStruct((b, h, 3, 6), jnp.float32), random_params(spec)
        )


# The module


@pytest.mark.parametrize("norm", [None, "affine", "batch"])
@pytest.mark.parametrize("pairwise", FORMS)
def test_the_state_has_the_canonical_names_before_the_first_call_and_after(pairwise, norm):
    block = NonLocalBlock(6, pairwise=pairwise, norm=norm, rngs=nnx.Rngs(0))
    shapes = nlc.param_shapes(block.spec)
    for _ in range(2):
        kinds = {kind: nnx.to_flat_state(nnx.state(block, kind)) for kind in (nnx.Param, nnx.BatchStat)}
        found = {kind: {".".join(path): variable.shape for path, variable in flat} for kind, flat in kinds.items()}
        for layer in ("theta", "phi", "g", "out"):  # whose kernel is the transpose of the weight
            if f"{layer}.kernel" in found[nnx.Param]:
                found[nnx.Param][f"{layer}.weight"] = found[nnx.Param].pop(f"{layer}.kernel")[::-1]
        assert found[nnx.BatchStat] == {name: shapes[name] for name in STATISTICS if name in shapes}
        assert found[nnx.Param] == {name: shapes[name] for name in shapes if name not in STATISTICS}
        block(random_input(3, 5, 7, 6))


def test_the_seed_alone_decides_the_start():
    first, same, other = (NonLocalBlock(6, rngs=nnx.Rngs(seed)).export_params() for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["theta.weight"], other["theta.weight"])
    assert not np.array_equal(first["theta.weight"], first["phi.weight"])


def test_split_and_merge_make_an_equal_block():
    block, x = random_block(norm="batch"), random_input(3, 5, 7, 6)
    graph, params, statistics = nnx.split(block, nnx.Param, nnx.BatchStat)
    halved = nnx.merge(graph, jax.tree.map(lambda a: a / 2, params), statistics)
    assert halved.spec == block.spec
    assert np.array_equal(halved.export_params()["out.weight"], block.export_params()["out.weight"] / 2)
    twin = nnx.merge(graph, params, statistics)
    assert np.array_equal(twin(x), block(x))


def test_a_clone_has_parameters_of_its_own():
    block = random_block(norm="batch")
    before = block.export_params()
    nnx.clone(block).import_params({name: 0 * a for name, a in before.items()})
    assert np.array_equal(block.export_params()["out.weight"], before["out.weight"])


def test_equal_blocks_are_traced_once_in_each_mode():
    traces = []

    @nnx.jit
    def call(block, x):
        traces.append(block.use_running_average)
        return block(x)

    x = random_input(3, 5, 7, 6)
    for seed in (0, 1):
        block = random_block(seed, norm="batch", bias=True)
        for change in (block.train, block.eval):
            change()
            call(block, x)
    assert traces == [False, True]


def test_statistics_move_in_training_alone():
    block, x = random_block(norm="batch"), random_input(3, 5, 7, 6)
    assert not block.use_running_average
    names = list(STATISTICS)

    def moves(block):
        before, _ = block.export_params(), block(x)
        return [not np.array_equal(block.export_params()[name], before[name]) for name in names]

    assert moves(block) == [True, True]
    block.eval()
    assert moves(block) == [False, False]
    assert moves(nnx.view(block, use_running_average=False)) == [True, True]
    assert block.use_running_average
    block.train()
    assert moves(block) == [True, True]


def test_the_mode_of_a_model_reaches_its_blocks():
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), random_block(norm="batch"))
    model.eval()
    assert model.layers[1].use_running_average
    model.train()
    assert not model.layers[1].use_running_average


def test_it_learns_from_its_start():
    block, x = NonLocalBlock(6, norm="batch", rngs=nnx.Rngs(0)), random_input(4, 9, 6)
    optimizer = nnx.Optimizer(block, optax.sgd(0.3, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(block, optimizer):
        loss, gradients = nnx.value_and_grad(lambda block: jnp.mean(jnp.square(block(x) - 0.5 * x[::-1])))(block)
        optimizer.update(block, gradients)
        return loss

    losses = [float(step(block, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert block.norm["variance"][...].max() < 1


def test_a_gradient_of_the_module_is_that_of_the_function():
    block, x = random_block(norm="batch"), random_input(3, 5, 7, 6)
    function = partial(nonlocal_block, spec=block.spec, training=True)
    expected = jit(jax.grad(lambda p: square(function(x, p))))(block.export_params())
    gradients = nnx.to_flat_state(compiled(nnx.grad(lambda block: square(block(x))), block))
    actual = {".".join(path).replace("kernel", "weight"): variable[...].T for path, variable in gradients}
    assert_trees_close(actual, {name: expected[name] for name in actual})
    assert set(expected) - set(actual) == set(STATISTICS)


def test_layers_under_scan_keep_their_statistics_apart():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return NonLocalBlock(6, norm="batch", zero_init=False, rngs=rngs)

    blocks, x = stacked(nnx.Rngs(0)), random_input(3, 5, 7, 6)
    z = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)
    assert z.shape == x.shape
    means = blocks.norm["mean"][...]
    assert means.shape == (3, 6)
    assert len(np.unique(means[:, 0])) == 3


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "affine"}, {"pairwise": "gaussian"}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_computation_trains_and_keeps_the_dtype_of_the_input(options, dtype):
    block, x = random_block(dtype=dtype, **options), random_input(3, 5, 7, 6)
    wide = nlc.nonlocal_block(x, block.export_params(), block.spec, training=True)

    def loss_of(block):
        z = block(x)
        return square(z), z

    (loss, z), gradients = compiled(nnx.value_and_grad(loss_of, has_aux=True), block)
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, wide, rtol=0.05, atol=0.2)
    leaves = jax.tree.leaves(gradients)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    assert all(bool(jnp.isfinite(a).all()) for a in (loss, *leaves))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("own", [True, False], ids=["block in the dtype", "block in float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_an_input_of_another_dtype_gives_an_output_of_that_dtype(dtype, own):
    block = random_block(norm="batch", subsample=2, param_dtype=dtype if own else "float32")
    x = random_input(3, 5, 7, 6)
    expected = nlc.nonlocal_block(x, random_params(block.spec), block.spec, training=True)

    def call(block, x):
        return block(x), block.attention(x, [0]), block.norm["mean"][...]

    z, rows, mean = compiled(call, block, jnp.asarray(x, dtype))
    assert z.dtype.name == rows.dtype.name == dtype
    assert mean.dtype.name == ("float64" if own and dtype == "float64" else "float32")
    np.testing.assert_allclose(z.astype(np.float32), expected, rtol=0.02, atol=0.1)


@pytest.mark.usefixtures("x64")
def test_a_user_function_gets_operands_that_are_at_least_float32():
    seen = []

    def form(theta, phi):
        seen.extend([theta.dtype.name, phi.dtype.name])
        return product(theta, phi)

    arrays = [jnp.ones((2, size, 3), jnp.bfloat16) for size in (5, 4, 4)]
    for dtype in (jnp.bfloat16, jnp.float64):
        nonlocal_op(*(a.astype(dtype) for a in arrays), pairwise=form, normalize="count")
    assert seen == ["float32"] * 2 + ["float64"] * 2


def test_an_empty_batch_gives_an_empty_output():
    block = random_block(subsample=2)
    assert block(random_input(0, 5, 7, 6)).shape == (0, 5, 7, 6)


@pytest.mark.parametrize("positions", [np.array([3, 1]), jnp.array([3, 1]), (3, 1)], ids=["numpy", "jax", "tuple"])
def test_positions_may_be_any_sequence_of_ints(positions):
    block, x = random_block(), random_input(3, 5, 7, 6)
    rows = nnx.jit(lambda block, x: block.attention(x, positions))(block, x)
    np.testing.assert_allclose(rows, block.attention(x)[:, [3, 1]], rtol=1e-5)


# Parameters in and out


def test_exported_parameters_are_copies():
    block = random_block()
    block.export_params()["g.weight"][:] = 0
    assert block.g.kernel[...].all()


def test_imported_parameters_are_copies_in_the_dtype_of_the_block():
    block, params = random_block(param_dtype=jnp.bfloat16), random_params(nlc.NonLocalSpec(channels=6), "float64")
    block.import_params(params)
    params["g.weight"][:] = 0
    assert block.g.kernel[...].all()
    assert {a.dtype.name for a in jax.tree.leaves(nnx.state(block))} == {"bfloat16"}


def test_parameters_of_bfloat16_are_exported_as_float32():
    block = random_block(param_dtype=jnp.bfloat16)
    exported_params = block.export_params()
    assert {a.dtype for a in exported_params.values()} == {np.dtype("float32")}
    assert np.array_equal(exported_params["g.weight"], block.g.kernel[...].T.astype(np.float32))


# Wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "x"}, TypeError, "`dtype` must be a floating-point dtype or None. Got 'x'"),
        ({"param_dtype": 3}, TypeError, "`param_dtype` must be a floating-point dtype or None. Got 3"),
        ({"metod": "auto"}, TypeError, "`metod` must be an option of NonLocalBlock. .* nearest is `method`"),
        ({"subsampel": 2}, TypeError, "`subsampel` must be an option of NonLocalBlock"),
        ({"method": "sorted"}, ValueError, "`method` must be 'auto', 'pairwise' or 'streamed' for the form"),
        ({"pairwise": "cosine"}, ValueError, "`pairwise` must be one of"),
        ({"channels": 0}, ValueError, "`channels` must be a positive int. Got 0"),
    ],
)
def test_wrong_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        NonLocalBlock(**{"channels": 6, "rngs": nnx.Rngs(0), **options})


SPEC = nlc.NonLocalSpec(channels=6, subsample=2)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("shape", "options", "error", "words"),
    [
        ((3, 5, 7, 5), {}, ValueError, "`x` must have 6 channels. Got 5 channels"),
        ((3, 5, 1, 6), {}, ValueError, "`subsample` must leave at least one window on spatial axis 1"),
        ((3, 5, 7, 6), {"spec": {}}, TypeError, "`spec` must be a NonLocalSpec. Got {} of type dict"),
        ((3, 5, 7, 6), {"params": {}}, ValueError, "`params` must hold exactly"),
        ((3, 5, 7, 6), {"method": "fast"}, ValueError, r"`method` must be one of 'auto', 'pairwise', .*\. Got 'fast'"),
        ((3, 5, 7, 6), {"key_mask": np.ones((3, 5, 7))}, TypeError, "`key_mask` must be boolean. Got float64"),
        ((3, 5, 7, 6), {"key_mask": np.ones((3, 5, 6), bool)}, ValueError, r"`key_mask` must have shape \(3, 5, 7\)"),
    ],
)
def test_wrong_arguments_are_named_when_the_function_is_traced(wrap, shape, options, error, words):
    options = {"spec": SPEC, "params": random_params(SPEC), **options}
    with pytest.raises(error, match=words):
        wrap(lambda x: nonlocal_block(x, **options))(random_input(*shape))


@pytest.mark.parametrize("name", ["theta", "phi", "g"])
def test_a_list_is_no_array(name):
    arrays = {key: jnp.ones((1, 2, 3)) for key in ("theta", "phi", "g")}
    with pytest.raises(TypeError, match=rf"`{name}` must be an array\. Got list"):
        nonlocal_op(**arrays | {name: [[[1.0]]]})
    with pytest.raises(TypeError, match=r"`x` must be an array\. Got list"):
        nonlocal_block([[1.0]], random_params(SPEC), SPEC)


def test_statistics_need_batch_norm():
    with pytest.raises(ValueError, match=r"`spec` must have norm 'batch' to have statistics\. Got norm None"):
        updated_statistics(random_input(3, 5, 7, 6), random_params(SPEC), SPEC)
    with pytest.raises(TypeError, match=r"`spec` must be a NonLocalSpec\. Got 'official' of type str"):
        updated_statistics(random_input(3, 5, 7, 6), random_params(SPEC), "official")


@pytest.mark.parametrize("missing", ["jax", "flax"])
def test_without_jax_or_flax_the_import_says_what_to_install(missing):
    code = f"import sys; sys.modules['{missing}'] = None; import nonlocal_jax"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert (
        "ImportError: nonlocal_jax needs JAX and Flax. Install them with `pip install 'nonlocal-core[jax]'`."
        in ran.stderr
    )
