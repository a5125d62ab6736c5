"""What is measured in TensorFlow: graphs made by `tf.function`, with XLA for the backend of that name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from nonlocal_core import NonLocalSpec
from nonlocal_tensorflow import NonLocalBlock

from .arrays import input_of, params_of, positions_of
from .case import PLAIN, Case
from .plain import plain

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


class _Plain:
    """The plain matrix, with variables as a layer of Keras has them."""

    def __init__(self, case: Case) -> None:
        with tf.device(_place(case)):
            weights = {name: tf.Variable(array) for name, array in params_of(case.spec).items()}
        self.case, self.params = case, weights
        self.trainable_weights = [
            SimpleNamespace(value=weight)
            for name, weight in weights.items()
            if not name.startswith(("norm.m", "norm.v"))
        ]

    def __call__(self, x: Any, *, training: bool) -> Any:
        def norm(r: Any, mean: Any, variance: Any, scale: Any, shift: Any) -> Any:
            r = tf.cast(r, x.dtype)
            if training:
                mean, variance = tf.nn.moments(r, [0, 1])
            return (r - mean) * (scale * (variance + self.case.spec.norm_epsilon) ** -0.5) + shift

        def narrow(operand: Any) -> Any:
            return tf.cast(operand, self.case.dtype)

        ops = SimpleNamespace(
            einsum=lambda equation, *operands: tf.einsum(equation, *map(narrow, operands)),
            linear=lambda x, weight, bias: narrow(x) @ tf.transpose(narrow(weight)) + narrow(bias),
            softmax=tf.nn.softmax,
            relu=tf.nn.relu,
            norm=norm,
        )
        flat = tf.reshape(x, (x.shape[0], -1, x.shape[-1]))
        return x + tf.reshape(plain(flat, self.params, self.case.spec, ops), x.shape)


def _block(case: Case) -> Any:
    policy = "float32" if case.dtype == "float32" else f"mixed_{case.dtype}"
    if case.backend in PLAIN:
        return _Plain(case)
    with tf.device(_place(case)):
        block = NonLocalBlock.from_spec(case.spec, method=case.asked, data_format="channels_last", dtype=policy)
        block.import_params(params_of(case.spec))
    return block


def _graph(case: Case, function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    with tf.device(_place(case)):
        given = [tf.constant(array) for array in arrays]
        graph = tf.function(function, jit_compile=case.backend.startswith("tensorflow_xla")).get_concrete_function(
            *given
        )

    def call() -> Any:
        with tf.device(_place(case)):
            result = graph(*given)
        tf.test.experimental.sync_devices()
        return result

    return call


def _place(case: Case) -> str:
    return "GPU:0" if case.device == "cuda" else "CPU:0"
