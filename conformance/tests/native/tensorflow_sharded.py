"""What a process with several devices does in the tests of cut inputs; it finds these functions by name."""

from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from nonlocal_conformance.sharded import tensorflow as cut
from nonlocal_tensorflow import NonLocalBlock, embed, norm
from nonlocal_tensorflow import sharded as adapter


def unknown(a, channels=None):
    """Return a tensor whose sizes, but the channels, are unknown while a function is traced."""
    shape = [None] * (len(a.shape) - 1) + [channels]
    return tf.raw_ops.PlaceholderWithDefault(input=a, shape=shape)


def traced(_, devices, spec, params, x, dz, mask):
    """Return what `sharded` does, of a traced function of pieces whose sizes are unknown."""
    strategy = cut.strategy_of(devices)
    with strategy.scope():
        block = cut.block_of(spec, params, sharded_axis=0)

    def step(x, dz, mask):
        arrays = unknown(x, spec.channels), unknown(dz, spec.channels), unknown(mask)
        return cut.differentiated(block, *arrays, training=True)

    given = [cut.cut_value(strategy, a, 1) for a in (x, dz, mask)]
    z, dx, dparams = tf.function(lambda *pieces: strategy.run(step, pieces))(*given)
    return (
        cut.whole(strategy, z, 1),
        cut.statistics_of(block),
        cut.whole(strategy, dx, 1),
        cut.summed(strategy, dparams),
    )


def squared(theta, phi):
    """Score pairs by the square of their product."""
    return tf.matmul(theta, phi, transpose_b=True) ** 2


def called(_, x, dim, options):
    """Return what a block of two replicas makes of the parts of `x` along `dim`, and what one makes of the whole."""
    alone, rng, strategy = NonLocalBlock(6, residual=False, **options), np.random.default_rng(0), cut.strategy_of(2)
    params = {name: rng.uniform(0.1, 1.1, a.shape) for name, a in alone.export_params().items()}
    alone.import_params(params)
    with strategy.scope():
        block = NonLocalBlock(6, residual=False, sharded_axis=1, **options)
        block.import_params(params)
    z = cut.whole(strategy, strategy.run(block, [cut.cut_value(strategy, x, dim)]), dim)
    return z.astype("float32"), tf.cast(alone(x), "float32").numpy()


def raised(_, name):
    """Return the error of a block on a cut input."""
    options = {
        "window": {"subsample": 2},
        "small window": {"subsample": 8},
        "groups": {"group_size": 2},
        "axis": {"sharded_axis": 1},
        "when run": {"subsample": 2},
    }
    shapes = {"groups": (2, 6, 4, 3, 6), "no position": (2, 1, 6)}
    strategy, case = cut.strategy_of(2), name.removesuffix(" of a new block")
    with strategy.scope():
        channels = 6 if case == name else None
        block = NonLocalBlock(channels, **{"sharded_axis": 0, "norm": "batch", **options.get(case, {})})
        if case == "another norm":
            block.norm = keras.layers.GroupNormalization(2)
    x = cut.cut_value(strategy, np.ones(shapes.get(case, (2, 6, 6)), "float32"), 1)
    calls = {
        "attention": lambda x: strategy.run(block.attention, [x]),
        "when run": tf.function(lambda x: strategy.run(lambda x: block(unknown(x, 6)), [x])),
    }
    try:
        calls.get(case, lambda x: strategy.run(block, [x]))(x)
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        return str(error)
    return None


def _local(a):
    """Take what this replica has for the sum over all."""
    return a


def _local_count(a):
    """Take what this replica has for the sum, of the second of two."""
    return [adapter_total(a[0]), a[1]] if isinstance(a, list) else adapter_total(a)


def _no_share(a):
    """Take this replica's gradient of a sum for that of all."""
    return tf.nest.map_structure(lambda one: one + tf.stop_gradient(adapter_total(one) - one), a)


def _no_share_of_keys(self, a):
    """Take this replica's gradient of gathered keys for that of all."""
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    own = a - tf.stop_gradient(a)  # 0, with a gradient
    pieces = [own if other == number else tf.zeros_like(a) for other in range(adapter.replicas())]
    return adapter_gather(self, tf.stop_gradient(a)) + tf.concat(pieces, 1)


def _alone(_, *arguments, **options):
    """Attend within the part of this replica."""
    return adapter.aggregate(*arguments, **options)


def _unmasked(self, theta, phi, g, form, _, method, *, gradients):
    """Gather keys as if each of them were valid."""
    return adapter_aggregate(self, theta, phi, g, form, None, method, gradients=gradients)


def _first(strategy, dparams):
    """Take the first replica's gradients of the parameters for those of all."""
    return {name: strategy.experimental_local_results(d)[0].numpy().T for name, d in dparams.items()}


adapter_total, adapter_aggregate = adapter.total, adapter.Spread.aggregate
adapter_gather = adapter.Spread._gather  # noqa: SLF001 - to be replaced

FAULTS = {
    "statistics of one device": (norm, "total", _local),
    "keys of one device counted": (adapter, "total", _local_count),
    "keys of one device": (adapter.Spread, "aggregate", _alone),
    "a gather without its mask": (adapter.Spread, "aggregate", _unmasked),
    "no share in the gradient of a sum": (adapter, "total", _no_share),
    "no share in the gradient of a gather": (adapter.Spread, "_gather", _no_share_of_keys),
    "no share in the gradient of a parameter": (cut, "summed", _first),
    "windows across borders": (embed, "check_cut", lambda *_: 0),
}


def faulty(rank, fault, *arguments):
    """Return what `sharded` does, of an adapter with a fault."""
    with mock.patch.object(*FAULTS[fault]):
        return cut.work(rank, *arguments)
