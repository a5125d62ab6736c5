"""What a process with several devices shows: each check raises an error where it does not hold."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nonlocal_core as nlc
from nonlocal_jax import NonLocalBlock, nonlocal_block, nonlocal_op, updated_statistics

FORMS = {
    "gaussian": "streamed",
    "embedded_gaussian": "streamed",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}
DEVICES = 4
EVERY = PartitionSpec("samples")


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("samples",), axis_types=(kind,))


def case(form, **options):
    """Return a spec, random parameters and an input with one sample, or more, for each device."""
    rng, spec = np.random.default_rng(0), nlc.NonLocalSpec(channels=6, pairwise=form, **options)
    params = {name: jnp.asarray(rng.uniform(0.1, 1, a), "float32") for name, a in nlc.param_shapes(spec).items()}
    return spec, params, rng.normal(size=(2 * DEVICES, 4, 6, 6)).astype("float32")


def assert_close(actual, expected, what):
    """Compare leaf by leaf, relative to the largest value of all: some gradients are zero by cancellation."""
    actual, expected = ([np.asarray(a) for a in jax.tree.leaves(tree)] for tree in (actual, expected))
    largest = max(np.abs(a).max() for a in expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=str(what))


def with_gradients(function):
    """Return a function that gives also the gradients of its sum of squares."""

    def both(*args):
        z, pull = jax.vjp(function, *args)
        return z, pull(2 * z)

    return both


def explicit(form):
    """The block runs as an nnx.Conv does on a batch whose type says how it lies on the mesh."""
    options = {"subsample": 2, "norm": "batch"} if form != "gaussian" else {"axes": (0,), "subsample": (2, 1)}
    spec, params, x = case(form, **options)
    mask = np.random.default_rng(1).random(x.shape[:-1]) < 0.7
    for method in ("pairwise", FORMS[form]):

        def function(x, params, method=method):
            return nonlocal_block(x, params, spec, jnp.asarray(mask), training=True, method=method)

        expected = jax.jit(with_gradients(function))(x, params)
        with jax.set_mesh(mesh_of(AxisType.Explicit)):
            spread = jax.device_put(x, EVERY)
            found = jax.jit(with_gradients(function))(spread, params)
            assert found[0].sharding.spec[0] == "samples", found[0].sharding
            assert_close(found, expected, (form, method))
        assert_close(function(spread, params), expected[0], (form, method, "op by op"))
    block = NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(0))
    block.import_params(params)
    twin, loss = nnx.clone(block), nnx.jit(nnx.grad(lambda block, x: jnp.sum(jnp.square(block(x)))))
    rows = block.attention(x, [1])
    gradients = loss(block, x)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        assert_close(twin.attention(spread, [1]), rows, form)
        assert_close(loss(twin, spread), gradients, form)
    assert_close(nnx.state(twin, nnx.BatchStat), nnx.state(block, nnx.BatchStat), form) if spec.norm else None


def mapped(form):
    """Inside shard_map a batch gives what it gives outside; loops carry what varies over the mesh."""
    spec, params, x = case(form, subsample=2)

    def function(x, params):
        return nonlocal_block(x, params, spec, method=FORMS[form])

    cuts = {"in_specs": (EVERY, PartitionSpec()), "out_specs": EVERY}
    inside = jax.shard_map(function, mesh=mesh_of(AxisType.Auto), **cuts)
    expected = jax.jit(with_gradients(function))(x, params)
    assert_close(jax.jit(with_gradients(inside))(x, params), expected, form)


def synchronised(form):
    """With the name of the mapped axis, statistics and gradients are those of the whole batch, however it is masked."""
    spec, params, x = case(form, norm="batch")
    cuts = {"mesh": mesh_of(AxisType.Auto), "in_specs": (EVERY, PartitionSpec(), EVERY)}
    for mask in (None, np.arange(x[..., 0].size).reshape(x.shape[:-1]) % 97 > np.arange(len(x))[:, None, None] * 9):

        def function(x, params, mask, axis_name=None):
            return nonlocal_block(x, params, spec, mask, training=True, axis_name=axis_name)

        def moved(x, params, mask, axis_name=None):
            return updated_statistics(x, params, spec, mask, unbiased=True, axis_name=axis_name)

        together = partial(jax.shard_map, **cuts)(partial(function, axis_name="samples"), out_specs=EVERY)
        found = jax.jit(with_gradients(lambda *args: together(*args, mask)))(x, params)  # noqa: B023 - called at once
        assert_close(found, jax.jit(with_gradients(lambda *args: function(*args, mask)))(x, params), form)  # noqa: B023
        together = partial(jax.shard_map, **cuts)(partial(moved, axis_name="samples"), out_specs=PartitionSpec())
        assert_close(jax.jit(together)(x, params, mask), moved(x, params, mask), form)


def collectives(form):
    """A batch over devices needs no word between them, and each computes its share alone."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2 * DEVICES, 300, 3)).astype("float32") for _ in range(3)]
    options = {"concat_weight": jnp.ones(6)} if form == "concatenation" else {}

    def function(theta, phi, g):
        return nonlocal_op(theta, phi, g, form, method=FORMS[form], **options)

    call, spread = jax.jit(with_gradients(function)), NamedSharding(mesh_of(AxisType.Auto), EVERY)
    alone = call.lower(*arrays).compile()
    parts = call.lower(*(jax.device_put(a, spread) for a in arrays)).compile()
    found = set(re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", parts.as_text()))
    assert not found, (form, found)
    share = parts.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share < 1.1 / DEVICES, (form, share)


if __name__ == "__main__":
    for form in FORMS:
        globals()[sys.argv[1]](form)
