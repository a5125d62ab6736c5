"""What a process with several devices does in the tests of cut inputs; it finds these functions by name."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nonlocal_conformance.sharded import jax as suite
from nonlocal_jax import NonLocalBlock, nonlocal_block, nonlocal_op, norm, op, updated_statistics
from nonlocal_jax import sharded as adapter
from nonlocal_jax.methods import fused

DEVICES = 4


def with_gradients(function):
    """Return a function that gives also the gradients of its first two arguments, for the gradient dz."""

    def both(x, params, dz, *rest):
        z, back, moved = jax.vjp(lambda x, params: function(x, params, *rest), x, params, has_aux=True)
        return z, moved, *back(dz)

    return both


def module(_, spec, params, x, dz, mask):
    """Return what a block gives on a mesh of two axes, that of the samples and that of the positions."""
    names = {"axis_name": "positions", "norm_axis_name": ("samples", "positions"), "sharded_axis": 0}
    block = NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(0), **names)
    block.import_params(params)
    graph, weights, rest = nnx.split(block, nnx.Param, ...)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("samples", "positions"))
    cut = PartitionSpec("samples", "positions")

    def part(x, weights, rest, mask):
        block = nnx.merge(graph, weights, rest)
        return block(x, mask), nnx.state(block, nnx.BatchStat)

    cuts = {"in_specs": (cut, PartitionSpec(), PartitionSpec(), cut), "out_specs": (cut, PartitionSpec())}
    call = jax.jit(with_gradients(jax.shard_map(part, mesh=mesh, **cuts)))
    z, moved, dx, dweights = call(x, weights, dz, rest, mask)
    nnx.update(block, moved)
    after = block.export_params()
    nnx.update(block, dweights)
    dparams = block.export_params()
    statistics = {name: after[name] for name in ("norm.mean", "norm.variance")}
    return np.array(z), statistics, np.array(dx), {name: dparams[name] for name in dparams.keys() - statistics.keys()}


def whole(_, spec, params, x, dz, mask):
    """Return what the block gives as it is, outside of any map, on arrays whose positions lie on several devices."""
    mesh = Mesh(np.array(jax.devices()), ("positions",))
    x, dz, mask = (jax.device_put(a, NamedSharding(mesh, PartitionSpec(None, "positions"))) for a in (x, dz, mask))

    def function(x, params, mask):
        return nonlocal_block(x, params, spec, mask, training=True), updated_statistics(x, params, spec, mask)

    compiled = suite.jit(with_gradients(function)).lower(x, params, dz, mask).compile()
    z, moved, dx, dparams = jax.tree.map(np.array, compiled(x, params, dz, mask))
    return z, moved, dx, suite.differentiable(dparams), suite.received(compiled.as_text(), DEVICES)


class Alone(adapter.Mapped):
    """Attention within the shard."""

    def aggregate(self, *arguments):
        return adapter.aggregate(*arguments)


def of_one_device(_, values, axis_name):
    """Take for a sum or a mean over devices what is on the first."""
    return lax.psum(jnp.where(lax.axis_index(axis_name) == 0, values, 0), axis_name)


def local_count(total):
    """Add up everything but numbers of keys."""
    return lambda a: a if isinstance(a, int) or jnp.issubdtype(a.dtype, jnp.integer) else total(a)


def no_share(total):
    """Take this device's gradient of a sum for that of all."""
    return lambda a: a if isinstance(a, int) else a + lax.stop_gradient(total(a) - a)


def with_total(change):
    """Return a patch of how the dot product adds up over devices."""

    def by_products(theta, phi, g, form, valid, total):
        return of_products(theta, phi, g, form, valid, change(total))

    of_products = adapter.by_products
    return mock.patch.object(adapter, "by_products", by_products)


def with_gather(change):
    """Return a patch of how keys are gathered."""
    gather = getattr(adapter.Mapped, "_gather")  # noqa: B009 - private
    return mock.patch.object(adapter.Mapped, "_gather", lambda self, a: change(partial(gather, self), self, a))


def unmasked(gather, _, a):
    """Gather keys as if each of them were valid."""
    return jnp.ones_like(gather(a)) if a.dtype == bool else gather(a)


def own_gradient(gather, mapped, a):
    """Take this device's gradient of keys for that of all."""
    if a.dtype == bool:
        return gather(a)
    first = lax.axis_index(mapped.key_axes) * a.shape[1]
    return lax.dynamic_update_slice_in_dim(lax.stop_gradient(gather(a)), a, first, axis=1)


FAULTS = {
    "statistics of one device": lambda: mock.patch.object(norm, "_over", of_one_device),
    "keys of one device counted": lambda: with_total(local_count),
    "keys of one device": lambda: mock.patch.object(adapter, "Mapped", Alone),
    "a gather without its mask": lambda: with_gather(unmasked),
    "no share in the gradient of a sum": lambda: with_total(no_share),
    "no share in the gradient of keys": lambda: with_gather(own_gradient),
    "windows across borders": lambda: mock.patch.object(adapter, "check_pieces"),
}


def faulty(rank, fault, *arguments, **options):
    """Return what `sharded` does, of an adapter with a fault."""
    with FAULTS[fault]():
        return suite.sharded(rank, *arguments, **options)


def fused_attention(_, axis):
    """Return the shapes that a kernel for whole sets gets of a divided input, and two outputs with their gradients."""
    found = []

    def kernel(query, key, value, **_):
        scores = jnp.einsum("btnh,bsnh->btns", query, key, preferred_element_type=jnp.float32)
        return jnp.einsum("btns,bsnh->btnh", jax.nn.softmax(scores).astype(value.dtype), value)

    def lower(mesh, given, result):
        shapes = [a.sharding.shard_shape(a.shape) for a in given]
        found.extend(shapes)
        return mesh, kernel, result.sharding, tuple(a.sharding for a in given)

    divided = custom_partitioning(kernel)
    divided.def_partition(lower, sharding_rule="b t n h, b s n h, b s n h -> b t n h")
    differentiable = jax.custom_vjp(divided.__call__)
    differentiable.defvjp(lambda *given: (divided(*given), given), lambda given, dy: jax.vjp(kernel, *given)[1](dy))
    given = [jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8)), "bfloat16")] * 3
    cut = NamedSharding(Mesh(np.array(jax.devices()), "d"), PartitionSpec(*[None] * axis, "d"))
    step = jax.jit(lambda *given: (nonlocal_op(*given), *jax.vjp(nonlocal_op, *given)[1](given[0])))
    with (
        mock.patch.object(op, "device_kind", return_value="gpu"),
        mock.patch.multiple(fused, PLATFORM="cpu", has_tensor_cores=lambda: True),
        mock.patch.object(fused, "KERNEL", lambda *given, **_: differentiable(*given)),
    ):
        spread = step(*(jax.device_put(a, cut) for a in given))
    return found, *([np.asarray(a, "float32") for a in found] for found in (spread, step(*given)))
