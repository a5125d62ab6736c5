"""A network in Keras."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from nonlocal_conformance.driver import Array, Params
from nonlocal_core import AttentionMap
from nonlocal_core.networks.insertion import Insertion
from nonlocal_tensorflow import attention_of, check_identity, insert_nonlocal, remove_nonlocal

__all__ = ["TensorflowNetwork"]


class TensorflowNetwork:
    """A functional model of dense layers; `scope` gives what it is made and run in."""

    def __init__(
        self, layers: Params, shape: tuple[int, ...], scope: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Take the matrices by the names of their layers, and the shape of an input."""
        self.scope = scope
        dtypes = {weight.dtype.name for weight in layers.values()}
        with scope():
            x = y = keras.Input(shape[1:], dtype=dtypes.pop())
            for name, weight in layers.items():
                layer = keras.layers.Dense(len(weight), use_bias=False, dtype=weight.dtype.name, name=name)
                y = layer(y)
                layer.set_weights([weight.T])
            self.model = keras.Model(x, y)

    def run(self, x: Array, *, training: bool = False) -> Array:
        """Return the output."""
        with self.scope():
            return self.model(tf.constant(x), training=training).numpy()

    def state(self) -> Params:
        """Return all weights by their paths."""
        return {weight.path: weight.value.numpy() for weight in self.model.weights}

    def insert(self, after: Any, x: Array, **options: Any) -> list[Insertion]:  # noqa: ARG002 - Keras knows what flows
        """Take the network with blocks for this one."""
        with self.scope():
            self.model, insertions = insert_nonlocal(self.model, after, data_format="channels_last", **options)
        return insertions

    def remove(self) -> None:
        """Take the network without blocks for this one."""
        self.model = remove_nonlocal(self.model)

    def load(self, block: str, params: Params) -> None:
        """Let a block take parameters in."""
        self.model.get_layer(block).import_params(params)

    def check_identity(self) -> None:
        """Check that every block is the identity."""
        check_identity(self.model)

    def attention_of(self, x: Array, block: str | None = None, positions: Any = None) -> AttentionMap:
        """Return rows of the weights of a block."""
        with self.scope():
            return attention_of(self.model, tf.constant(x), block, positions)
