"""What Keras alone asks of the block: variables, shapes, a configuration; and its batch normalisation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from nonlocal_core.arguments import Size
from nonlocal_core.errors import fail_value
from nonlocal_core.networks.block import CanonicalBlock
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.block import options_of
from nonlocal_core.spec.calls import check_arrays
from nonlocal_core.spec.parameters import initial_moments, param_shapes
from nonlocal_tensorflow.arrays import channels_last, wide

__all__ = ["BatchNorm", "KerasBlock"]

_NORM_NAMES = {
    "norm.weight": "gamma",
    "norm.bias": "beta",
    "norm.mean": "moving_mean",
    "norm.variance": "moving_variance",
}


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


class KerasBlock(CanonicalBlock, keras.layers.Layer):
    """A Keras layer whose variables, shapes and configuration follow from a spec."""

    spec: NonLocalSpec = None  # type: ignore[assignment]  # until the first input tells the channels
    norm: BatchNorm | None = None
    channels: int | None
    method: str
    data_format: str
    _spec_of: partial[NonLocalSpec]
    _own_names: tuple[str, ...]
    """The canonical names of the parameters that are not those of a layer `norm`."""

    @classmethod
    def from_spec(
        cls,
        spec: NonLocalSpec,
        *,
        method: str = "auto",
        data_format: str | None = None,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        autocast: bool = True,
    ) -> Self:
        """Return a new block that computes `spec`."""
        own = {"method": method, "data_format": data_format, "name": name, "dtype": dtype}
        return cls(**options_of(spec), **own, trainable=trainable, autocast=autocast)

    def build(self, x_shape: Sequence[Size], key_mask_shape: Sequence[Size] | None = None) -> None:
        """Create the parameters for an input of this shape, if they do not exist yet.

        Args:
            x_shape: the shape of `x`, None where a size is unknown.
            key_mask_shape: the shape of `key_mask`, if there is one.

        Raises:
            ValueError: if the shape does not fit the options, or its channels are needed and unknown.
        """
        shape = channels_last(x_shape, self.data_format)
        if self.spec is None and shape[-1] is None:
            raise fail_value("channels", "be given where the channels of the input are unknown", None)
        spec = self._spec_of(channels=shape[-1]) if self.spec is None else self.spec
        spec.check_input(shape, mask_shape=key_mask_shape)
        if self.spec is None:
            self._create(spec)

    def compute_output_shape(self, x_shape: Sequence[Size]) -> tuple[Size, ...]:
        """Return the shape of z, which is that of `x`."""
        return tuple(x_shape)

    def compute_output_spec(
        self,
        x: Any,
        key_mask: Any = None,
        training: bool | None = None,  # noqa: ARG002 - Keras gives what `call` takes
        mask: Any = None,
    ) -> keras.KerasTensor:
        """Return the shape and the dtype of z for a symbolic `x`, which is checked."""
        key_mask = mask if key_mask is None else key_mask
        check_arrays(self.spec, channels_last(x.shape, self.data_format), x, key_mask, training=False)
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, from which Keras makes an equal layer.

        Raises:
            ValueError: if `pairwise` is a function.
        """
        spec = self._spec_of(channels=1 if self.channels is None else self.channels)
        inner = self._spec_of.keywords.get("inner_channels")
        return {
            **super().get_config(),
            **json.loads(spec.to_json()),
            "channels": None if self.channels is None else spec.channels,
            "inner_channels": None if inner is None else spec.inner_channels,
            "method": self.method,
            "data_format": self.data_format,
            "autocast": self.autocast,
        }

    def _create(self, spec: NonLocalSpec) -> None:
        """Take the spec and create its parameters."""
        self.spec, shapes = spec, param_shapes(spec)
        self._own_names = tuple(name for name in shapes if spec.norm != "batch" or name not in _NORM_NAMES)
        for name in self._own_names:
            start = _initializer(name, spec)
            # Each use casts for itself: a norm is folded into W_z in full precision.
            variable = self.add_weight(shape=shapes[name], initializer=start, name=name, autocast=False)
            # Checkpoints of TensorFlow find attributes, and pass over the values of a dict.
            setattr(self, name.replace(".", "_"), variable)
        if spec.norm == "batch":
            self.norm = BatchNorm(
                momentum=1 - spec.norm_momentum,
                epsilon=spec.norm_epsilon,
                gamma_initializer=_initializer("norm.weight", spec),
                name="norm",
                dtype=self.variable_dtype,
                trainable=self.trainable,
            )
            with keras.name_scope(self.name, caller=self):
                self.norm.build((None, None, spec.channels))

    def _canonical(self) -> dict[str, Any]:
        """Return the live parameters and statistics under their canonical names."""
        if self.spec is None:
            raise fail_value("channels", "be given, or the block built, before it has parameters", None)
        params = {name: getattr(self, name.replace(".", "_")) for name in self._own_names}
        if self.norm is not None:
            params |= {name: getattr(self.norm, attribute) for name, attribute in _NORM_NAMES.items()}
        return params

    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over the values of all parameters, which fit."""
        variables = self._canonical()
        cast = {name: tf.cast(params[name], variable.dtype) for name, variable in variables.items()}
        for name, variable in variables.items():
            variable.assign(cast[name])

    def _like(self, spec: NonLocalSpec) -> Self:
        """Return a new block that computes `spec` and is like this one in all else."""
        return self.from_spec(
            spec,
            method=self.method,
            data_format=self.data_format,
            name=self.name,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            autocast=self.autocast,
        )


def _initializer(name: str, spec: NonLocalSpec) -> keras.initializers.Initializer:
    """Return how a parameter starts; one of its own for each, since Keras' repeat their values."""
    mean, deviation = initial_moments(name, spec)
    return keras.initializers.RandomNormal(mean, deviation) if deviation else keras.initializers.Constant(mean)
