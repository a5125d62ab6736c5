"""Blocks that leave the program in which they were made: as exported programs, and on several devices."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import nonlocal_core as nlc
from nonlocal_conformance.sharded.jax import quick_options
from nonlocal_jax import NonLocalBlock, insert_nonlocal, nonlocal_block

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
SIZES = [(2, 5, 7), (3, 9, 4)]

# Every program here runs once or twice: with these options XLA compiles it several times faster.
jit = partial(jax.jit, compiler_options=quick_options())


pytestmark = pytest.mark.usefixtures("_compile_fast")


def random_block(**options):
    """Return a block in evaluation whose every parameter is random."""
    block, rng = NonLocalBlock(6, rngs=nnx.Rngs(0), **options), np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, shape) for name, shape in nlc.param_shapes(block.spec).items()})
    block.eval()
    return block


def random_input(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def random_mask(*shape):
    """Return a mask whose last sample has no key at all."""
    mask = np.random.default_rng(2).random(shape) < 0.6
    mask[-1] = False
    return mask


def symbolic(channels):
    """Return the input and the key mask of a program for every size."""
    sizes = export.symbolic_shape("b,h,w")
    return jax.ShapeDtypeStruct((*sizes, channels), jnp.float32), jax.ShapeDtypeStruct(sizes, jnp.bool_)


def assert_trees_close(actual, expected, rtol=1e-5):
    """Compare leaf by leaf, relative to the largest value of all: some gradients are zero by cancellation."""
    scale = max(np.abs(a).max() for a in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=rtol * scale), actual, expected)


def through_bytes(function, *arguments, vjp_order=0, **options):
    """Return a function as it comes back from its bytes."""
    program = export.export(jax.jit(function), **options)(*arguments)
    return export.deserialize(program.serialize(vjp_order=vjp_order)).call


# Exported programs


@pytest.mark.parametrize("pairwise", FORMS)
def test_a_module_is_exported_with_its_weights_for_every_size(pairwise):
    block = random_block(pairwise=pairwise, subsample=2, norm="batch")
    call = jit(through_bytes(block, *symbolic(6)))
    for sizes in SIZES:
        x, mask = random_input(*sizes, 6), random_mask(*sizes)
        expected = nlc.nonlocal_block(x, block.export_params(), block.spec, mask)
        assert_trees_close(call(x, mask), expected)


@pytest.mark.parametrize("pairwise", FORMS)
def test_an_exported_function_can_be_differentiated_at_every_size(pairwise):
    block = random_block(pairwise=pairwise, subsample=2, norm="affine")
    spec, params = block.spec, block.export_params()
    call = through_bytes(lambda x, params: nonlocal_block(x, params, spec), symbolic(6)[0], params, vjp_order=1)

    @jit
    def differentiated(x, params):
        z, pull = jax.vjp(call, x, params)
        return z, pull(z)

    for sizes in SIZES:
        x = random_input(*sizes, 6)
        z, gradients = differentiated(x, params)
        assert_trees_close(gradients, nlc.nonlocal_block_vjp(x, params, spec, np.asarray(z)))


@pytest.mark.parametrize("pairwise", FORMS)
def test_one_program_is_exported_for_processors_and_accelerators(pairwise):
    block = random_block(pairwise=pairwise)
    program = export.export(jax.jit(block), platforms=["cpu", "cuda", "tpu"])(symbolic(6)[0])
    x = random_input(2, 5, 7, 6)
    assert_trees_close(jit(program.call)(x), nlc.nonlocal_block(x, block.export_params(), block.spec))


def test_a_network_with_an_inserted_block_is_exported():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.relu, nnx.Conv(6, 4, (1, 1), rngs=rngs))
    example = symbolic(3)[0]
    insert_nonlocal(model, ["layers.0"], rngs=rngs, example_input=example, subsample=2, zero_init=False)
    block, made = model.layers[0].nonlocal_block, random_block(subsample=2, zero_init=False)
    block.import_params(made.export_params())
    call = jit(through_bytes(model, example))
    for sizes in SIZES:
        x = random_input(*sizes, 3)
        assert_trees_close(call(x), jit(model)(x))


def test_an_exported_training_step_takes_and_gives_the_state_as_plain_dicts():
    block = random_block(subsample=2, norm="batch")
    block.train()
    graph, params, statistics = nnx.split(block, nnx.Param, nnx.BatchStat)

    def step(params, statistics, x):
        def loss_of(params):
            made = nnx.merge(graph, params, statistics)
            return jnp.mean(jnp.square(made(x))), nnx.to_pure_dict(nnx.state(made, nnx.BatchStat))

        (loss, moved), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        return loss, gradients, moved

    plain = [nnx.to_pure_dict(state) for state in (params, statistics)]
    call = jit(through_bytes(step, *plain, symbolic(6)[0]))
    for sizes in SIZES:
        x = random_input(*sizes, 6)
        loss, gradients, moved = call(*plain, x)
        given = block.export_params()
        z = nlc.nonlocal_block(x, given, block.spec, training=True)
        _, expected = nlc.nonlocal_block_vjp(x, given, block.spec, 2 * z / z.size, training=True)
        np.testing.assert_allclose(loss, np.mean(np.square(z)), rtol=1e-5)
        gradients = {f"{layer}.{kind}": a for layer, kinds in gradients.items() for kind, a in kinds.items()}
        gradients = {name.replace("kernel", "weight"): a.T for name, a in gradients.items()}
        assert_trees_close(gradients, expected)
        statistics_after = nlc.updated_statistics(x, given, block.spec)
        assert_trees_close({f"norm.{name}": array for name, array in moved["norm"].items()}, statistics_after)


# Several devices

EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import nonlocal_core as nlc
from nonlocal_jax import NonLocalBlock

rng = np.random.default_rng(0)
x, target = rng.normal(size=(2, 16, 5, 7, 6)).astype("float32") + np.arange(16, dtype="float32").reshape(16, 1, 1, 1)


@nnx.jit
def step(block, optimizer, x, target):
    def loss_of(block):
        z = block(x)
        return jnp.mean(jnp.square(z - target)), z

    (_, z), gradients = nnx.value_and_grad(loss_of, has_aux=True)(block)
    optimizer.update(block, gradients)
    return z, gradients


def results(sharding, mode, pairwise):
    rng, options = np.random.default_rng(1), {"subsample": 2, "norm": "batch", "rngs": nnx.Rngs(0)}
    block = NonLocalBlock(6, pairwise=pairwise, **options)
    block.import_params({name: rng.uniform(0.1, 1.1, shape) for name, shape in nlc.param_shapes(block.spec).items()})
    block.set_attributes(use_running_average=mode == "evaluation")
    optimizer = nnx.Optimizer(block, optax.sgd(0.1), wrt=nnx.Param)
    z, gradients = step(block, optimizer, jax.device_put(x, sharding), jax.device_put(target, sharding))
    return z, gradients, nnx.state(block, nnx.BatchStat), nnx.state(block, nnx.Param)


mesh = jax.make_mesh((8,), ("samples",), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, PartitionSpec("samples"))
forms = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
for mode, form in [("evaluation", "embedded_gaussian"), *(("training", form) for form in forms)]:
    many, one = results(spread, mode, form), results(jax.devices()[0], mode, form)
    assert many[0].sharding.is_equivalent_to(spread, 4), many[0].sharding
    for part, whole in zip(many, one, strict=True):
        part, whole = (list(map(np.asarray, jax.tree.leaves(tree))) for tree in (part, whole))
        largest = max(np.abs(array).max() for array in whole)
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=f"{mode}, {form}")

block = NonLocalBlock(6, rngs=nnx.Rngs(0))
block.import_params(block.export_params())
z = nnx.jit(lambda block, x: block(x))(block, jax.device_put(x, spread))
assert z.sharding.is_equivalent_to(spread, 4), "an import has bound the block to one device"
everywhere = NamedSharding(mesh, PartitionSpec())
nnx.update(block, jax.device_put(nnx.state(block), everywhere))
block.import_params(block.export_params())
assert block.g.kernel[...].sharding == everywhere, "an import has taken the block from its devices"
"""


def run_on(devices, *arguments):
    """Run a program in a process with several devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    subprocess.run([sys.executable, *arguments], env=environment, check=True)


def test_a_batch_on_eight_devices_gives_what_one_gives_and_imported_parameters_stay_on_them():
    run_on(8, "-c", EIGHT_DEVICES)


@pytest.mark.parametrize("what", ["explicit", "mapped", "synchronised", "collectives"])
def test_a_batch_spread_over_devices_gives_what_one_gives_and_each_works_on_its_own_part(what):
    run_on(4, Path(__file__).with_name("jax_devices.py"), what)
