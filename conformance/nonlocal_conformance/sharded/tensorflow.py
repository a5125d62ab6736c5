"""Blocks of Keras on TensorFlow, alone and on an input that is cut over replicas, on virtual devices of the CPU."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nonlocal_conformance.driver import Array, Params, Spec, dtype_of
from nonlocal_conformance.processes import Processes
from nonlocal_core.spec.parameters import STATISTICS
from nonlocal_tensorflow import NonLocalBlock

__all__ = [
    "block_of",
    "cut_value",
    "differentiated",
    "name_of",
    "new_block",
    "processes",
    "statistics_of",
    "strategy_of",
    "summed",
    "twice_differentiated",
    "whole",
    "work",
]

_NAMES = {"kernel": "weight", "gamma": "weight", "beta": "bias"}

_STARTED: dict[int, Processes] = {}


def processes(devices: int) -> Processes:
    """Return a process that has so many devices, the same on every call unless it had to be ended."""
    if devices not in _STARTED or _STARTED[devices].is_closed:
        _STARTED[devices] = Processes(1, __name__)
    return _STARTED[devices]


@functools.cache
def strategy_of(devices: int) -> tf.distribute.Strategy:
    """Return the strategy of this process, which has no other; errors come without what Keras adds to their words."""
    keras.config.disable_traceback_filtering()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(devices)])


def work(
    _: int,
    devices: int,
    axis: int,
    spec: Spec,
    params: Params,
    arrays: tuple[Any, ...],
    vparams: Params | None,
    training: bool,
    method: str,
) -> Any:
    """Return in the process what a driver's `sharded` returns, or with directions what its `sharded_hvp` does.

    Args:
        devices: how many replicas cut the arrays; if they do not divide the size the last get less.
        axis: the axis of `x` that they cut, 0 for the batch.
        spec: the block.
        params: its parameters.
        arrays: x, dz and the mask, and where there are directions that of x.
        vparams: the directions of the parameters, or None.
        training: as of a driver.
        method: as of a driver.
    """
    strategy = strategy_of(devices)
    cut = [None if a is None else cut_value(strategy, a, axis) for a in arrays]
    options: dict[str, Any] = {"sharded_axis": axis - 1} if axis else {"synchronized": True}
    with strategy.scope():
        block = block_of(spec, params, method=method, **options)
    if vparams is None:
        z, dx, dparams = strategy.run(functools.partial(differentiated, block, training=training), cut)
        return whole(strategy, z, axis), statistics_of(block), whole(strategy, dx, axis), summed(strategy, dparams)
    given = [*cut, vparams]
    dx, dparams = strategy.run(functools.partial(twice_differentiated, block, training=training), given)
    return whole(strategy, dx, axis), summed(strategy, dparams)


def cut_value(strategy: tf.distribute.Strategy, a: Array, axis: int) -> Any:
    """Give each replica its piece of an array."""
    each = -(-a.shape[axis] // strategy.num_replicas_in_sync)
    pieces = np.split(a, each * np.arange(1, strategy.num_replicas_in_sync), axis)
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(pieces[context.replica_id_in_sync_group])
    )


def whole(strategy: tf.distribute.Strategy, a: Any, axis: int) -> Array:
    """Return the pieces of all replicas as one array."""
    return np.concatenate([piece.numpy() for piece in strategy.experimental_local_results(a)], axis)


def summed(strategy: tf.distribute.Strategy, dparams: dict[str, Any]) -> Params:
    """Return the sums of the replicas' shares of gradients, whose kernels are transposed weights."""
    shares = {name: strategy.experimental_local_results(d) for name, d in dparams.items()}
    return {name: np.sum([d.numpy().T for d in each], axis=0) for name, each in shares.items()}


def block_of(spec: Spec, params: Params, policy: str | None = None, **options: Any) -> NonLocalBlock:
    """Return a layer with these parameters and options."""
    block = new_block(spec, policy or dtype_of(params), **options)
    block.import_params(params)
    return block


def new_block(spec: Spec, policy: str, **options: Any) -> NonLocalBlock:
    """Return a layer with these options for an input that Keras leaves in its own dtype."""
    return NonLocalBlock.from_spec(spec, dtype=policy, autocast=False, data_format="channels_last", **options)


def differentiated(block: NonLocalBlock, x: tf.Tensor, dz: tf.Tensor, mask: Any, *, training: bool) -> Any:
    """Return z, dx and the gradients of the trainable weights."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        z = block(x, key_mask=mask, training=training)
    return z, *tape.gradient(z, (x, _trainable(block)), dz)


def twice_differentiated(
    block: NonLocalBlock, x: tf.Tensor, dz: tf.Tensor, mask: Any, vx: tf.Tensor, vparams: Params, *, training: bool
) -> Any:
    """Return the gradients of <gradients, v> with respect to `x` and the trainable weights."""
    sources = (x, _trainable(block))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            z = block(x, key_mask=mask, training=training)
        dx, dparams = inner.gradient(z, sources, dz)
        products = [dx * vx, *(d * vparams[name].T for name, d in dparams.items())]
        product = tf.add_n([tf.reduce_sum(a) for a in products])
    return outer.gradient(product, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def statistics_of(block: NonLocalBlock) -> Params:
    """Return the running statistics of a block, if it has any."""
    params = block.export_params()
    return {name: params[name] for name in STATISTICS if name in params}


def _trainable(block: NonLocalBlock) -> dict[str, Any]:
    """Return the trainable weights under their canonical names; kernels are transposed weights."""
    return {name_of(weight): weight.value for weight in block.trainable_weights}


def name_of(weight: Any) -> str:
    """Return the canonical name of a weight of a block."""
    layer, name = weight.path.split("/")[-2:]
    return name if "." in name else f"{layer}.{_NAMES.get(name, name)}"
