"""The layers of the block and its other parameters, and what it does with them under their canonical names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import keras
import numpy as np
import tensorflow as tf

from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.networks.block import CanonicalBlock
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import SpecOptions
from nonlocal_core.spec.parameters import initial_moments, param_shapes
from nonlocal_tensorflow.linear import check_plain, kernel_and_bias
from nonlocal_tensorflow.norm import BatchNorm

__all__ = ["LAYERS", "BlockOptions", "DenseOptions", "LayeredBlock", "parted"]

_LINEAR = ("theta", "phi", "g", "out")
LAYERS = (*_LINEAR, "norm")

_NORM_NAMES = {
    "norm.weight": "gamma",
    "norm.bias": "beta",
    "norm.mean": "moving_mean",
    "norm.variance": "moving_variance",
}


class DenseOptions(TypedDict, total=False):
    """Arguments of Keras' Dense that a block hands on to each of its linear layers."""

    kernel_initializer: Any
    bias_initializer: Any
    kernel_regularizer: Any
    bias_regularizer: Any
    kernel_constraint: Any
    bias_constraint: Any


class BlockOptions(SpecOptions, DenseOptions, total=False):
    """The options of a block."""


class LayeredBlock(CanonicalBlock, keras.layers.Layer):
    """A Keras layer that holds the layers of a spec; each may be replaced by another of the same widths."""

    spec: NonLocalSpec = None  # type: ignore[assignment]  # until the first input tells the channels
    theta: keras.Layer | None = None
    phi: keras.Layer | None = None
    g: keras.Layer | None = None
    out: keras.Layer | None = None
    norm: keras.Layer | None = None
    pairwise: keras.Layer | None = None
    data_format: str
    synchronized: bool
    sharded_axis: int | None
    _given: partial[keras.layers.Dense]
    """Keras' Dense with the arguments that were given for it."""
    _own_names: tuple[str, ...]
    """The canonical names of the parameters that are not those of a layer."""

    def _create(self, spec: NonLocalSpec) -> None:
        """Take the spec and create its layers and parameters."""
        self.spec, shapes = spec, param_shapes(spec)
        for name in LAYERS:
            if f"{name}.weight" in shapes and (name != "norm" or spec.norm == "batch"):
                layer = getattr(self, name)
                setattr(self, name, self.new_layer(name) if layer is None else layer)
        self._own_names = tuple(name for name in shapes if getattr(self, name.partition(".")[0], None) is None)
        for name in self._own_names:
            start = _initializer(name, spec)
            # Each use casts for itself.
            variable = self.add_weight(shape=shapes[name], initializer=start, name=name, autocast=False)
            # Checkpoints of TensorFlow find attributes, and pass over the values of a dict.
            setattr(self, name.replace(".", "_"), variable)

    def new_layer(self, name: str) -> keras.Layer:
        """Return a layer of the spec as it starts."""
        shared = {"name": name, "dtype": self.dtype_policy, "trainable": self.trainable}
        start = _initializer(f"{name}.weight", self.spec)
        if name == "norm":
            return BatchNorm(
                momentum=1 - self.spec.norm_momentum,
                epsilon=self.spec.norm_epsilon,
                gamma_initializer=start,
                synchronized=self.synchronized or self.sharded_axis is not None,
                **shared | {"dtype": self.variable_dtype},
            )
        # One of its own for each, since Keras' repeat their values.
        given = {
            key: one.clone() if isinstance(one, keras.Initializer) else one for key, one in self._given.keywords.items()
        }
        if not any(initial_moments(f"{name}.weight", self.spec)):  # the block starts as the identity in any case
            given = {key: one for key, one in given.items() if not key.endswith("initializer")}
        options = {"kernel_initializer": start, **given, **shared}
        return keras.layers.Dense(self._widths(name)[1], use_bias=self.spec.bias[name], **options)

    def quantize(self, mode: str | None = None, **options: Any) -> None:
        """Quantise the linear layers as Keras does, with its options; it does the same for a whole model."""
        for name in _LINEAR:
            if (layer := getattr(self, name)) is not None:
                layer.quantize(mode, **options)

    def _widths(self, name: str) -> tuple[int, int]:
        """Return how many channels go into a layer and come out of it."""
        outer, inner = self.spec.channels, self.spec.inner_channels
        return {"out": (inner, outer), "norm": (outer, outer)}.get(name, (outer, inner))

    def __setattr__(self, name: str, value: Any) -> None:
        """Take a layer in the place of another of the block, which Keras would keep beside it."""
        old = vars(self).get(name) if name in LAYERS else None
        if name in LAYERS and value is not None and not isinstance(value, keras.Layer):
            raise fail_type(name, "be a keras.Layer", value)
        if name in LAYERS and value is not None and self.spec is not None:
            entering, leaving = self._widths(name)
            with keras.name_scope(self.name, caller=self):
                y = value(keras.KerasTensor((None, None, entering), self.compute_dtype))
            if y.shape != (None, None, leaving):
                raise fail_value(name, f"be a layer that gives (B, N, {leaving}) for (B, N, {entering})", y.shape)
        if old is not None:
            self._tracker.unlock()
            self._tracker.untrack(old)
        super().__setattr__(name, value)

    def own_params(self) -> dict[str, Any]:
        """Return the live parameters and statistics that are not those of linear layers under their canonical names."""
        params = {name: getattr(self, name.replace(".", "_")) for name in self._own_names}
        if type(self.norm) in {BatchNorm, keras.layers.BatchNormalization}:  # another class may call them otherwise
            params |= {name: getattr(self.norm, attribute) for name, attribute in _NORM_NAMES.items()}
        return params

    def _canonical(self, layers: Sequence[str] = (*LAYERS, "concat"), *, written: bool = False) -> dict[str, Any]:
        """Return the parameters and statistics of some layers under their canonical names.

        Raises:
            ValueError: if there are none yet, or a layer computes with more than its weights; if they are to be
                written, also if it has LoRA.
        """
        if self.spec is None:
            raise fail_value("channels", "be given, or the block built, before it has parameters", None)
        params = self.own_params()
        for name in _LINEAR:
            layer = getattr(self, name)
            if layer is not None and name in layers:
                check_plain(name, layer, written=written)
                kernel, bias = kernel_and_bias(layer)
                params |= {f"{name}.weight": tf.transpose(kernel)} | ({} if bias is None else {f"{name}.bias": bias})
        names = [name for name in param_shapes(self.spec) if name.partition(".")[0] in layers]
        if not params.keys() >= set(names):
            raise fail_value("norm", "be a keras.layers.BatchNormalization for its parameters to be read", self.norm)
        return {name: params[name] for name in names}

    def last_params(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the parameters of the last factor under their canonical names."""
        last = self._canonical(("out" if self.spec.norm is None else "norm",))
        return {name: to_numpy(name, value) for name, value in last.items()}

    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over the values of all parameters, which fit."""
        self._canonical(written=True)
        variables = self.own_params()
        for name in _LINEAR:
            if (layer := getattr(self, name)) is not None:
                variables |= {f"{name}.weight": layer.kernel, f"{name}.bias": layer.bias}
        cast = {name: tf.cast(array.T, variables[name].dtype) for name, array in params.items()}
        for name, array in cast.items():
            variables[name].assign(array)

    def load_own_variables(self, store: Any) -> None:
        """Load the variables from a file, in which all may be those of the block, as 0.1.0 wrote them."""
        layers = [layer for name in _LINEAR if (layer := getattr(self, name)) is not None]
        if self.spec is None or len(store.keys()) < sum(len(layer.weights) for layer in layers):
            super().load_own_variables(store)
            return
        names = [name for name in param_shapes(self.spec) if self.norm is None or name not in _NORM_NAMES]
        kept = {name: np.asarray(store[str(number)]) for number, name in enumerate(names)}
        self._assign({**self.export_params(), **kept})
        for layer in layers:
            _load_later(layer)


def parted(options: BlockOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the spec, and what is given for its linear layers, as objects of Keras."""
    dense = DenseOptions.__annotations__
    given = {name: one for name, one in options.items() if name in dense and one is not None}
    made = {name: getattr(keras, f"{name.partition('_')[2]}s").get(one) for name, one in given.items()}
    return {name: one for name, one in options.items() if name not in dense}, made


def _initializer(name: str, spec: NonLocalSpec) -> keras.initializers.Initializer:
    """Return how a parameter starts; one of its own for each, since Keras' repeat their values."""
    mean, deviation = initial_moments(name, spec)
    return keras.initializers.RandomNormal(mean, deviation) if deviation else keras.initializers.Constant(mean)


def _load_later(layer: keras.Layer) -> None:
    """Let a layer pass over the next load if there is nothing for it."""
    load = layer.load_own_variables

    def passed(store: Any) -> None:
        del layer.load_own_variables
        if store.keys():
            load(store)

    layer.load_own_variables = passed
