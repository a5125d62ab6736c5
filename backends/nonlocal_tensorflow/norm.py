"""Batch normalisation, as a layer of its own and folded into the layer before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from nonlocal_tensorflow.arrays import wide

__all__ = ["BatchNorm", "folded"]


class BatchNorm(keras.layers.BatchNormalization):
    """Keras' layer on `(B, N, C)`, with second derivatives that are right in training.

    Keras takes the variance about a mean that has no gradient, which is right for first derivatives alone.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: None = None) -> tf.Tensor:
        """Return gamma (r - mean) / sqrt(variance + epsilon) + beta."""
        if not (training and self.trainable):
            return super().call(inputs, training=False, mask=mask)
        r = tf.cast(inputs, wide(inputs.dtype))
        gamma, beta, *running = (
            tf.cast(weight, r.dtype) for weight in (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        )
        shift = tf.stop_gradient(_mean(r))
        r -= shift  # a long sum in float32 loses digits, the fewer the smaller its terms
        mean = _mean(r)
        variance = _mean(tf.square(r - mean))
        self.moving_mean.assign(self.momentum * running[0] + (1 - self.momentum) * (shift + mean))
        self.moving_variance.assign(self.momentum * running[1] + (1 - self.momentum) * variance)
        return tf.cast(gamma * ((r - mean) / tf.sqrt(variance + self.epsilon)) + beta, inputs.dtype)


def _mean(r: tf.Tensor) -> tf.Tensor:
    """Return the mean of each channel of `(B, N, C)`, by sample first: two short sums are more exact than one."""
    return tf.reduce_mean(tf.reduce_mean(r, axis=1), axis=0)


def folded(
    weight: Any, bias: Any, gamma: Any, beta: Any, statistics: Sequence[Any], epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return W and b of a layer with the norm after it in them; `statistics` is empty, or mean and variance."""
    dtype = wide(weight.dtype)
    weight, gamma, beta, *statistics = (tf.cast(a, dtype) for a in (weight, gamma, beta, *statistics))
    if statistics:
        mean, variance = statistics
        gamma /= tf.sqrt(variance + epsilon)
        beta -= gamma * mean
    return gamma[:, None] * weight, beta if bias is None else beta + gamma * tf.cast(bias, dtype)
