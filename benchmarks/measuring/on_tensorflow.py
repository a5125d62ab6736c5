"""What is measured in TensorFlow: graphs made by `tf.function`, with XLA for the backend of that name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from nonlocal_core import NonLocalSpec
from nonlocal_tensorflow import NonLocalBlock

from .arrays import input_of, params_of, positions_of
from .case import Case

__all__ = ["forward", "peak", "product", "rows", "spec_of", "to_numpy", "training"]


def forward(case: Case) -> Callable[[], Any]:
    """Return the call of a block in evaluation."""
    block = _block(case)
    return _graph(case, lambda x: block(x, training=False), input_of(case.shape))


def training(case: Case) -> Callable[[], Any]:
    """Return a training step: the gradients for dz, that of z."""
    block = _block(case)

    def step(x: Any, dz: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = block(x, training=True)
        return tape.gradient(z, (x, [weight.value for weight in block.trainable_weights]), tf.cast(dz, z.dtype))

    return _graph(case, step, input_of(case.shape), input_of(case.shape, seed=2))


def rows(case: Case) -> Callable[[], Any]:
    """Return the call for some rows of the weights."""
    block, positions = _block(case), positions_of(case.positions)
    return _graph(case, lambda x: block.attention(x, positions), input_of(case.shape))


def product(case: Case, size: int) -> Callable[[], Any]:
    """Return the product of two square matrices, for comparison."""
    return _graph(case, lambda matrix: matrix @ matrix, tf.ones((size, size), case.dtype))


def peak(_: Case, call: Callable[[], Any]) -> int:
    """Return the most memory that a call on a GPU holds beside what is held already."""
    tf.config.experimental.reset_memory_stats("GPU:0")
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    call()
    return int(tf.config.experimental.get_memory_info("GPU:0")["peak"] - before)


def to_numpy(z: Any) -> np.ndarray[Any, Any]:
    """Return an output as an array, channels last."""
    return np.asarray(z, np.float32)


def spec_of(case: Case) -> NonLocalSpec:
    """Return what the block computes."""
    return case.spec


def _block(case: Case) -> NonLocalBlock:
    policy = "float32" if case.dtype == "float32" else f"mixed_{case.dtype}"
    with tf.device(_place(case)):
        block = NonLocalBlock.from_spec(case.spec, method=case.asked, data_format="channels_last", dtype=policy)
        block.import_params(params_of(case.spec))
    return block


def _graph(case: Case, function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    with tf.device(_place(case)):
        given = [tf.constant(array) for array in arrays]
        graph = tf.function(function, jit_compile=case.backend == "tensorflow_xla").get_concrete_function(*given)

    def call() -> Any:
        with tf.device(_place(case)):
            result = graph(*given)
        tf.test.experimental.sync_devices()
        return result

    return call


def _place(case: Case) -> str:
    return "GPU:0" if case.device == "cuda" else "CPU:0"
