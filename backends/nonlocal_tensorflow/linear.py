"""The linear layers of a block: fused where they are exactly Keras' own, called where they are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend import AutocastScope  # the only way to read a variable in its own dtype while a layer runs

from nonlocal_core.errors import fail_value

__all__ = ["check_plain", "is_plain", "kernel_and_bias", "linear", "product"]


def linear(a: tf.Tensor, layer: keras.Layer | None, leading: Sequence[Any]) -> tf.Tensor:
    """Return W a + b on the last axis, `a` without a layer, in the dtype of `a`, as `(*leading, C')`."""
    if layer is not None and is_plain(layer) and layer.compute_dtype == a.dtype:
        return product(a, *kernel_and_bias(layer), leading)
    if layer is not None:  # which sees `(B, N, C)` in any case
        a = tf.cast(layer(tf.reshape(a, [leading[0], math.prod(leading[1:]), a.shape[-1]])), a.dtype)
    return tf.reshape(a, [*leading, a.shape[-1]])


def product(a: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, leading: Sequence[Any]) -> tf.Tensor:
    """Return a K + b on the last axis in the dtype of `a`, as `(*leading, C')`."""
    y = tf.matmul(tf.reshape(a, [-1, kernel.shape[0]]), tf.cast(kernel, a.dtype))
    y = y if bias is None else tf.nn.bias_add(y, tf.cast(bias, a.dtype))
    return tf.reshape(y, [*leading, kernel.shape[1]])


def is_plain(layer: keras.Layer) -> bool:
    """Return whether a layer is Keras' Dense, and nothing has been hung on it that its weights do not tell."""
    return _weighs(layer) and not layer.lora_enabled and layer.activity_regularizer is None


def _weighs(layer: keras.Layer) -> bool:
    """Return whether a layer is Keras' Dense and computes what its weights say, those of LoRA with them."""
    return (
        type(layer) is keras.layers.Dense
        and layer.activation is keras.activations.linear
        and layer.quantization_mode is None
        and "call" not in vars(layer)
    )


def kernel_and_bias(layer: keras.Layer) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Return what a Dense computes with, `(C, C')` and `(C',)`, as it is kept: Keras rounds what a layer reads."""
    with AutocastScope(None):
        return tf.convert_to_tensor(layer.kernel), None if layer.bias is None else tf.convert_to_tensor(layer.bias)


def check_plain(name: str, layer: keras.Layer, *, written: bool) -> None:
    """Check that the weights of a layer are what it computes with, and may be written.

    Raises:
        ValueError: if it is another layer than Keras' Dense, or is quantised, or to be written and has LoRA.
    """
    if _weighs(layer):
        if not (written and layer.lora_enabled):
            return
        raise fail_value(name, "be without LoRA, for its weights to be written", f"rank {layer.lora_rank}")
    rule = "be a keras.layers.Dense, linear and not quantised, for its weights to be read or written"
    raise fail_value(name, rule, layer)
