"""The networks in TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from learning.start import CHANNELS, MOMENTUM, OUTPUTS, RATE, SPEC, WIDTH, initial
from learning.task import CANVAS
from nonlocal_tensorflow import NonLocalBlock

Array = np.ndarray[Any, Any]


def normed(x: Any, leaving: int, side: int, name: str, **options: Any) -> Any:
    """Return a convolution and the normalisation of its output."""
    x = layers.Conv2D(leaving, side, use_bias=False, name=f"{name}.conv", **options)(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}.norm")(x)


def residual(x: Any, width: int, name: str) -> Any:
    """Return x + a convolution of a convolution."""
    inner = layers.ReLU()(normed(x, width, 3, f"{name}.first", padding="same"))
    return layers.add([x, normed(inner, CHANNELS, 1, f"{name}.second")])


def network(middle: str) -> keras.Model:
    """Return a network that says which digits are on a canvas, and whether it is the same twice."""
    inputs = keras.Input((*CANVAS, 1))
    x = layers.ReLU()(normed(inputs, CHANNELS, 4, "stem", strides=2))
    x = layers.ReLU()(residual(x, CHANNELS, "before"))
    if middle == "convolution":
        x = residual(x, WIDTH, "middle")
    elif middle == "non-local block":
        x = NonLocalBlock.from_spec(SPEC, name="middle")(x)
    x = layers.ReLU()(residual(x, CHANNELS, "after"))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(OUTPUTS, name="head")(x))


class Learner:
    """A network that learns."""

    def __init__(self, middle: str, seed: int) -> None:
        self.network = network(middle)
        for name, values in initial(middle, seed).items():
            layer = self.network.get_layer(name)
            if isinstance(layer, NonLocalBlock):
                layer.import_params(values)
            else:
                for kind, value in values.items():
                    getattr(layer, {"scale": "gamma"}.get(kind, kind)).assign(value)
        self.optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
        self.optimizer.build(self.network.trainable_variables)
        self.loss = keras.losses.BinaryCrossentropy(from_logits=True)
        self._step = tf.function(self._step_of)

    def step(self, canvases: Array, labels: Array) -> float:
        """Learn from one batch and return its loss."""
        return float(self._step(tf.constant(canvases), tf.constant(labels)))

    def _step_of(self, canvases: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = self.loss(labels, self.network(canvases, training=True))
        variables = self.network.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    def logits(self, canvases: Array) -> Array:
        """Return the scores of the answers, above 0 for yes."""
        return self.network(canvases).numpy()
