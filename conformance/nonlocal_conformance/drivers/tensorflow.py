"""The driver of the TensorFlow adapter."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from nonlocal_conformance.capabilities import BACKENDS, DEVICES
from nonlocal_conformance.driver import Array, Everything, Mask, Network, Params, Session, Spec, dtype_of
from nonlocal_conformance.memory import peak_resident
from nonlocal_conformance.networks.tensorflow import TensorflowNetwork
from nonlocal_conformance.sharded.tensorflow import (
    block_of,
    differentiated,
    name_of,
    new_block,
    processes,
    statistics_of,
    twice_differentiated,
    work,
)
from nonlocal_core.planning import METHODS
from nonlocal_tensorflow import NonLocalBlock, nonlocal_op

__all__ = ["TensorflowDriver"]

T = TypeVar("T")

_KINDS = {"cpu": "CPU", "cuda": "GPU", "gpu": "GPU"}


class TensorflowDriver:
    """`nonlocal_tensorflow` on one device."""

    name = "tensorflow"
    version = tf.__version__
    dtypes = ("float64", "float32")
    methods = METHODS
    mixed_dtypes: tuple[str, ...] = ("bfloat16", "float16")
    capabilities = BACKENDS["tensorflow"]
    unbiased = False

    def __init__(self, device: str = "cpu") -> None:
        """Take the device, which must be there."""
        kind, _, number = device.partition(":")
        self._where = f"{_KINDS.get(kind, kind)}:{number or 0}"
        if not any(found.name.endswith(f":{self._where}") for found in tf.config.list_logical_devices()):
            message = f"`device` must be one that TensorFlow finds on this machine. Got {device!r}."
            raise ValueError(message)
        self.device, self._new_block = device, lru_cache(maxsize=8)(new_block)
        # What is tested as float32 has to be that: by default some GPUs multiply it in TF32.
        tf.config.experimental.enable_tensor_float_32_execution(enabled=False)
        if kind != "cpu":  # several devices are virtual ones
            self.capabilities = self.capabilities - DEVICES
            self.notes = "float32 without TF32"
            found = tf.config.list_physical_devices(_KINDS.get(kind, kind))[int(number or 0)]
            details = tf.config.experimental.get_device_details(found)
            if details.get("compute_capability", (0, 0)) >= (8, 0):
                self.mixed_dtypes = (*self.mixed_dtypes, "tensorfloat32")

    def block(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the output of a block and its running statistics after the call."""
        return _Session(self._kept(spec, params, method), self._scope).call(x, key_mask, training=training)

    def steps(
        self, spec: Spec, params: Params, inputs: Sequence[Array], *, training: bool = False
    ) -> list[tuple[Array, Params]]:
        """Call one block on each input in turn."""
        session = self.session(spec, params)
        return [session.call(x, training=training) for x in inputs]

    def vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the gradients of the input and of the parameters."""
        return _Session(self._kept(spec, params, method), self._scope).gradients(x, dz, key_mask, training=training)[2:]

    def session(self, spec: Spec, params: Params, *, method: str = "auto") -> Session:
        """Return a layer."""
        with self._scope():
            return _Session(block_of(spec, params, method=method), self._scope)

    def hvp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        vx: Array,
        vparams: Params,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the gradients of <gradients, v>, reverse over reverse."""
        block = self._kept(spec, params, method)
        with self._scope():
            arrays = tf.constant(x), tf.constant(dz), _mask(key_mask), tf.constant(vx)
            return _arrays(*twice_differentiated(block, *arrays, vparams, training=training))

    def train(
        self, spec: Spec, params: Params, x: Array, target: Array, key_mask: Mask = None, *, steps: int, rate: float
    ) -> tuple[list[float], Params]:
        """Return the losses, mean squares of z - target, and the parameters of plain SGD in training mode."""
        with self._scope():
            block = block_of(spec, params)
            optimizer, mean_square, losses = keras.optimizers.SGD(rate), keras.losses.MeanSquaredError(), []
            for _ in range(steps):
                with tf.GradientTape() as tape:
                    loss = mean_square(target, block(tf.constant(x), key_mask=_mask(key_mask), training=True))
                weights = block.trainable_weights
                optimizer.apply(tape.gradient(loss, weights), weights)
                losses.append(float(loss))
            return losses, block.export_params()

    def op(self, theta: Array, phi: Array, g: Array, **options: Any) -> Array:
        """Return the operation alone."""
        with self._scope():
            return nonlocal_op(*map(tf.constant, (theta, phi, g)), **_options(options)).numpy()

    def op_vjp(self, theta: Array, phi: Array, g: Array, dy: Array, **options: Any) -> Params:
        """Return the gradients of the operation alone."""
        arrays = {"theta": theta, "phi": phi, "g": g}
        arrays |= {name: options.pop(name) for name in ("concat_weight", "concat_bias") if name in options}
        with self._scope():
            leaves = {name: tf.constant(a) for name, a in arrays.items()}
            with tf.GradientTape() as tape:
                tape.watch(leaves)
                y = nonlocal_op(**leaves, **_options(options))
            return {name: d.numpy() for name, d in tape.gradient(y, leaves, tf.constant(dy)).items()}

    def attention(self, spec: Spec, params: Params, x: Array, positions: Any = None, key_mask: Mask = None) -> Array:
        """Return rows of the weights."""
        block = self._kept(spec, params)
        with self._scope():
            return block.attention(tf.constant(x), positions, _mask(key_mask)).numpy()

    def export(self, spec: Spec, params: Params) -> Params:
        """Take parameters in and give them out again."""
        with self._scope():
            return block_of(spec, params).export_params()

    def create(self, **options: Any) -> Spec:
        """Return the spec of a block with these options."""
        return NonLocalBlock(**options).spec

    def rebuilt(self, spec: Spec) -> Spec:
        """Return the spec of a layer that was made from the config of another."""
        return NonLocalBlock.from_config(NonLocalBlock.from_spec(spec).get_config()).spec

    def initial(self, spec: Spec, seed: int = 0) -> Params:
        """Return the parameters of a new block."""
        state = random.getstate()
        random.seed(seed)  # where the initializers of Keras take their seeds
        try:
            with self._scope():
                return NonLocalBlock.from_spec(spec).export_params()
        finally:
            random.setstate(state)

    def compiled(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> Array:
        """Return the output of a block compiled by XLA."""
        with self._scope():
            block = block_of(spec, params, method=method)
            call = tf.function(lambda x, mask: block(x, key_mask=mask, training=training), jit_compile=True)
            return call(tf.constant(x), _mask(key_mask)).numpy()

    def mixed(
        self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None, *, method: str = "auto"
    ) -> Array:
        """Return the output under a policy of mixed precision, for an input that Keras leaves in its own dtype."""
        with self._mixed(dtype) as policy:
            block = block_of(spec, params, policy, method=method)
            return block(tf.constant(x), key_mask=_mask(key_mask)).numpy()

    def compiled_vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> Everything:
        """Return the output and the gradients of a block, which XLA compiles together."""
        with self._scope():
            block = block_of(spec, params, method=method)

            compiled = tf.function(lambda *arrays: differentiated(block, *arrays, training=training), jit_compile=True)
            z, *gradients = compiled(tf.constant(x), tf.constant(dz), _mask(key_mask))
            return z.numpy(), statistics_of(block), *_arrays(*gradients)

    def mixed_vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        dtype: str,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> Everything:
        """Return the output and the gradients under a policy of mixed precision."""
        with self._mixed(dtype) as policy:
            session = _Session(block_of(spec, params, policy, method=method), self._scope)
            return session.gradients(x, dz, key_mask, training=training)

    def mixed_attention(self, spec: Spec, params: Params, x: Array, dtype: str, key_mask: Mask = None) -> Array:
        """Return rows of the weights under a policy of mixed precision."""
        with self._mixed(dtype) as policy:
            return block_of(spec, params, policy).attention(tf.constant(x), None, _mask(key_mask)).numpy()

    def replaced(
        self, spec: Spec, params: Params, x: Array, dz: Array, layer: str, key_mask: Mask = None
    ) -> tuple[Array, tuple[Array, Params], Array, Callable[[], Params]]:
        """Return what a block with a doubled layer gives."""
        with self._scope():
            block = block_of(spec, params)
            old = getattr(block, layer)
            doubled = _Doubled.from_config(old.get_config())
            setattr(block, layer, doubled)
            for new, weight in zip(doubled.weights, old.weights, strict=True):
                new.assign(weight)
            given, mask = tf.constant(x), _mask(key_mask)
            z, *gradients = differentiated(block, given, tf.constant(dz), mask, training=False)
            return z.numpy(), _arrays(*gradients), block.attention(given, None, mask).numpy(), block.export_params

    def sharded(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        key_mask: Mask = None,
        *,
        axis: int,
        devices: int,
        training: bool = False,
        method: str = "auto",
    ) -> Everything:
        """Return what a layer gives in the replicas of a strategy, on virtual devices."""
        cut = x, dz, key_mask
        return processes(devices)(work, devices, axis, spec, params, cut, None, training, method)[0]

    def sharded_hvp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        vx: Array,
        vparams: Params,
        key_mask: Mask = None,
        *,
        axis: int,
        devices: int,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the gradients of <gradients, v> of a cut input."""
        cut = x, dz, key_mask, vx
        return processes(devices)(work, devices, axis, spec, params, cut, vparams, training, method)[0]

    def network(self, layers: Params, shape: tuple[int, ...]) -> Network:
        """Return a network of linear layers."""
        return TensorflowNetwork(layers, shape, self._scope)

    def peak_memory(self, call: Callable[[], T]) -> tuple[T, int | None]:
        """Return the result of a call and its peak extra memory in bytes.

        An allocator of TensorFlow keeps what is given back to it, so that a process does not grow: it is asked itself.
        """
        try:
            tf.config.experimental.reset_memory_stats(self._where)
        except ValueError:  # on a CPU without oneDNN there is none
            return peak_resident(call)
        before = tf.config.experimental.get_memory_info(self._where)["current"]
        result = call()
        return result, tf.config.experimental.get_memory_info(self._where)["peak"] - before

    def _kept(self, spec: Spec, params: Params, method: str = "auto") -> NonLocalBlock:
        """Return a layer for one call, the same for each spec: to make one takes longer than most calls."""
        with self._scope():
            block = self._new_block(spec, dtype_of(params), method=method)
            block.import_params(params)
            return block

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Compute on the device, and let errors through without the arguments that Keras adds to their words."""
        filtering = keras.config.is_traceback_filtering_enabled()
        keras.config.disable_traceback_filtering()
        try:
            with tf.device(self._where):
                yield
        finally:
            if filtering:
                keras.config.enable_traceback_filtering()

    @contextmanager
    def _mixed(self, dtype: str) -> Iterator[str]:
        """Compute on the device, under the policy that is given, with which products have operands in `dtype`."""
        is_tensorfloat32 = dtype == "tensorfloat32"
        tf.config.experimental.enable_tensor_float_32_execution(enabled=is_tensorfloat32)
        try:
            with self._scope():
                yield "float32" if is_tensorfloat32 else f"mixed_{dtype}"
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(enabled=False)


class _Session:
    """A layer."""

    def __init__(self, block: NonLocalBlock, scope: Callable[[], AbstractContextManager[None]]) -> None:
        self._block, self._scope = block, scope

    def call(self, x: Array, key_mask: Mask = None, *, training: bool = False) -> tuple[Array, Params]:
        """Return z and the running statistics."""
        with self._scope():
            z = self._block(tf.constant(x), key_mask=_mask(key_mask), training=training)
            return z.numpy(), statistics_of(self._block)

    def gradients(self, x: Array, dz: Array, key_mask: Mask = None, *, training: bool = False) -> Everything:
        """Return the gradients of the input and of the trainable weights."""
        with self._scope():
            arrays = tf.constant(x), tf.constant(dz), _mask(key_mask)
            z, *gradients = differentiated(self._block, *arrays, training=training)
            return z.numpy(), statistics_of(self._block), *_arrays(*gradients)

    def load(self, params: Params) -> None:
        """Take parameters in."""
        with self._scope():
            self._block.import_params(params)

    def params(self) -> Params:
        """Give the parameters out."""
        return self._block.export_params()

    def freeze(self, names: Collection[str]) -> None:
        """Let weights be no longer trainable, one by one."""
        for weight in self._block.weights:
            weight.trainable = weight.trainable and name_of(weight) not in names

    def copies(self) -> dict[str, Session]:
        """Return a layer with the config and the weights of this one, and what copy makes of it."""
        with self._scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Keras gives arrays out as older NumPy asked for them
            anew = NonLocalBlock.from_config(self._block.get_config())
            anew.set_weights(self._block.get_weights())
            found = {"config": anew, "deepcopy": copy.deepcopy(self._block)}
            return {name: _Session(block, self._scope) for name, block in found.items()}


class _Doubled(keras.layers.Dense):  # type: ignore[misc]  # Keras has no types
    """A linear layer that gives twice as much."""

    def call(self, a: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Return 2 (W a + b)."""
        return 2 * super().call(a, training=training)


def _mask(key_mask: Mask) -> tf.Tensor | None:
    return None if key_mask is None else tf.constant(key_mask)


def _arrays(dx: tf.Tensor, dparams: dict[str, tf.Tensor]) -> tuple[Array, Params]:
    return dx.numpy(), {name: d.numpy().T for name, d in dparams.items()}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tf.constant(a) if isinstance(a, np.ndarray) else a for name, a in options.items()}
