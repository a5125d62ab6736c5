"""The batch normalisation of the block."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from nonlocal_tensorflow.arrays import masked, wide
from nonlocal_tensorflow.sharded import replicas, total

__all__ = ["BatchNorm"]


@keras.saving.register_keras_serializable(package="nonlocal_tensorflow")
class BatchNorm(keras.layers.BatchNormalization):
    """Keras' layer on `(B, N, C)`, with second derivatives that are right in training, and exact counts under a mask.

    Keras takes the variance about a mean that has no gradient, which is right for first derivatives alone.
    """

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None, **options: Any
    ) -> tf.Tensor:
        """Return gamma (r - mean) / sqrt(variance + epsilon) + beta, with the statistics of what is not masked."""
        if not (training and self.trainable):
            return super().call(inputs, training=False, mask=None, **options)
        r = tf.cast(inputs, wide(inputs.dtype))
        gamma, beta, *running = (
            tf.cast(weight, r.dtype) for weight in (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        )
        count = None
        if mask is not None or (self.synchronized and replicas() > 1):
            kept = tf.ones_like(r[:, :, 0]) if mask is None else tf.cast(mask, r.dtype)
            count = self._summed(tf.reduce_sum(kept))
        shift = tf.stop_gradient(self._mean(r, mask, count))
        r -= shift  # a long sum in float32 loses digits, the fewer the smaller its terms
        mean = self._mean(r, mask, count)
        variance = self._mean(tf.square(r - mean), mask, count)
        new = [
            self.momentum * a + (1 - self.momentum) * b for a, b in zip(running, (shift + mean, variance), strict=True)
        ]
        if mask is not None:  # without any position the running statistics serve and stay
            some = tf.greater(count, 0)
            mean, variance = tf.where(some, mean, running[0] - shift), tf.where(some, variance, running[1])
            new = [tf.where(some, one, old) for one, old in zip(new, running, strict=True)]
        self.moving_mean.assign(new[0])
        self.moving_variance.assign(new[1])
        return tf.cast(gamma * ((r - mean) / tf.sqrt(variance + self.epsilon)) + beta, inputs.dtype)

    def _mean(self, r: tf.Tensor, mask: tf.Tensor | None, count: tf.Tensor | None) -> tf.Tensor:
        """Return the mean of each channel of `(B, N, C)`, by sample first: two short sums are more exact than one."""
        if count is None:
            return tf.reduce_mean(tf.reduce_mean(r, axis=1), axis=0)
        r = r if mask is None else masked(r, mask)
        return self._summed(tf.reduce_sum(tf.reduce_sum(r, axis=1), axis=0)) / tf.maximum(count, 1)

    def _summed(self, a: tf.Tensor) -> tf.Tensor:
        """Return the sum of `a` over all replicas, if the layer is synchronised."""
        return total(a) if self.synchronized else a
