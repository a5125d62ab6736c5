"""The non-local block as a Keras layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack

import keras
import numpy as np
import tensorflow as tf

from nonlocal_core.arguments import Size, check_choice, check_positions, dtype_name
from nonlocal_core.errors import fail_value
from nonlocal_core.geometry import Sets
from nonlocal_core.networks.folding import fold_norm
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_arrays
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.options import SpecOptions
from nonlocal_core.spec.parameters import STATISTICS, check_params, initial_moments, param_shapes
from nonlocal_tensorflow.arrays import channels_last, masked, sizes
from nonlocal_tensorflow.norm import BatchNorm, folded
from nonlocal_tensorflow.op import aggregate
from nonlocal_tensorflow.sets import checks_when_run, cut, flat, pool, pooled_mask, set_numbers, uncut
from nonlocal_tensorflow.weights import pairwise_weights

__all__ = ["NonLocalBlock"]

_NORM_NAMES = {
    "norm.weight": "gamma",
    "norm.bias": "beta",
    "norm.mean": "moving_mean",
    "norm.variance": "moving_variance",
}


@keras.saving.register_keras_serializable(package="nonlocal_tensorflow")
class NonLocalBlock(keras.layers.Layer):
    """Add to every position of its input what it gathers from all others (Wang et al., CVPR 2018, equation 6).

    One class serves sequences, images and videos: the rank comes from the input. With `training=True` batch
    normalisation uses the statistics of the input. Operands are in the compute dtype of the layer's dtype
    policy; scores, weights and sums over keys are at least float32.

    Args:
        channels: C, the channels of the input and of the output. None: those of the first input, from which the
            parameters are then created.
        method: how the operation is computed: "auto", "pairwise" (the N x M matrix), or the method without it that
            serves the form: "streamed" (gaussian, embedded_gaussian), "reassociated" (dot_product) or "sorted"
            (concatenation).
        data_format: "channels_last", `(B, S1..Sk, C)`, or "channels_first", `(B, C, S1..Sk)`. None: the setting
            of Keras, which is "channels_last" unless it was changed.
        name: the name of the layer.
        dtype: the dtype or the dtype policy of the layer.
        trainable: whether the parameters are trained.
        autocast: whether Keras casts the input, and so z, to the compute dtype. If not, the operands alone are cast.
        **options: the other options of `nonlocal_core.NonLocalSpec`.

    Raises:
        TypeError: if an option has a wrong type or is unknown.
        ValueError: if an option has a wrong value.

    Example:
        >>> block = NonLocalBlock(64, subsample=2, norm="batch")
        >>> x = tf.random.normal((2, 14, 14, 64))
        >>> bool(tf.reduce_all(block(x) == x))  # a new block is the identity
        True
        >>> block.attention(x, positions=[0, 97]).shape
        TensorShape([2, 2, 49])
    """

    spec: NonLocalSpec | None

    def __init__(
        self,
        channels: int | None = None,
        *,
        method: str = "auto",
        data_format: str | None = None,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        autocast: bool = True,
        **options: Unpack[SpecOptions],
    ) -> None:
        """Create the parameters if `channels` is known; see the class for the arguments."""
        super().__init__(name=name, dtype=dtype, trainable=trainable, autocast=autocast)
        data_format = keras.config.image_data_format() if data_format is None else data_format
        self.data_format = check_choice("data_format", data_format, ("channels_last", "channels_first"))
        self.method, self.channels = method, channels
        self.supports_masking = True
        self.spec, self.norm = None, None
        self._spec_of = partial(NonLocalSpec, **options)
        spec = self._spec_of(channels=1 if channels is None else channels)  # refuses wrong options in any case
        check_method(method, spec.pairwise)
        if channels is not None:
            self._create(spec)
            self.built = True

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
        options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        own = {"method": method, "data_format": data_format, "name": name, "dtype": dtype}
        return cls(**options, **own, trainable=trainable, autocast=autocast)

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

    def call(
        self,
        x: tf.Tensor,
        key_mask: tf.Tensor | None = None,
        training: bool | None = None,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return z_i = x_i + norm(W_z y_i + b_z).

        Args:
            x: `(B, S1..Sk, C)`, k = 1, 2 or 3, floating point, or `(B, C, S1..Sk)` as `data_format` says.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key. None: where `mask` is True.
            training: whether batch normalisation uses the statistics of this input and updates the running ones.
            mask: the mask that Keras attached to `x`, if any; it stays attached to z.

        Returns:
            z, with the shape and the dtype of `x` as cast by Keras.

        Raises:
            TypeError: if `x` is not floating point or `key_mask` is not boolean.
            ValueError: if a shape does not fit the spec.
        """
        key_mask = mask if key_mask is None else key_mask
        from_batch = bool(training) and self.norm is not None and self.norm.trainable
        grid, sets = self._enter(x, key_mask, training=from_batch)
        theta = flat(cut(self._project(grid, "theta"), sets))
        (phi, g), valid = self._keys(grid, sets, key_mask, "phi", "g")
        y = aggregate(theta, phi, g, self._form(), valid, self.method, gradients=bool(training))
        r = self._out(uncut(y, sets, sets.inner_sizes), from_batch=from_batch)
        z = tf.cast(self._first(tf.reshape(r, sizes(grid))), x.dtype)
        return x + z if self.spec.residual else z

    def attention(
        self,
        x: tf.Tensor,
        positions: Sequence[int] | tf.Tensor | None = None,
        key_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return rows of the weights w_ij with which the block sums its keys.

        Args:
            x: `(B, S1..Sk, C)`, or `(B, C, S1..Sk)` as `data_format` says.
            positions: flat indices of Q queries, row-major. None: all N.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key.

        Returns:
            `(B, Q, M)` in the dtype of `x`: M counts every key of the pooled grid in row-major order, and the
            weight is 0 where a key is masked or lies outside the set of the query.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if a shape does not fit the spec or a position is out of range.
        """
        if self.spec is None:
            self.build(x.shape)
        grid, sets = self._enter(x, key_mask, training=False)
        rows = flat(grid)
        queries, keys = set_numbers(sets)
        if positions is not None:
            chosen = check_positions(positions, rows.shape[1])
            rows, queries = tf.gather(rows, chosen, axis=1), tf.gather(queries, chosen)
        (phi,), mask = self._keys(grid, sets, key_mask, "phi")
        valid = (queries[:, None] == keys)[None]
        if mask is not None:
            phi = masked(phi, mask)
            valid &= tf.linalg.matrix_transpose(uncut(mask[..., None], sets, sets.key_sizes))
        phi = uncut(phi, sets, sets.key_sizes)
        return tf.cast(pairwise_weights(self._project(rows, "theta"), phi, self._form(), valid), x.dtype)

    def export_params(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return a copy of the parameters under their canonical names, as NumPy arrays (bfloat16 as float32)."""
        weights = {name: weight.numpy() for name, weight in self._canonical().items()}
        return {name: np.array(a, "float32" if dtype_name(a) == "bfloat16" else None) for name, a in weights.items()}

    def import_params(self, params: Mapping[str, Any]) -> None:
        """Take over parameters under their canonical names; nothing changes if they do not fit.

        Args:
            params: a mapping from exactly the names of `nonlocal_core.param_shapes(self.spec)` to arrays.

        Raises:
            TypeError: if `params` is not a mapping.
            ValueError: if a parameter is missing or unknown, or has a wrong shape.
        """
        weights = self._canonical()
        check_params(params, self.spec)
        given = {name: tf.cast(np.asarray(params[name]), weight.dtype) for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.assign(given[name])

    def fold_norm(self) -> Self:
        """Return a new block without norm that computes what this one computes in evaluation.

        Name, method and all else that is no option of the norm are those of this block; see
        `nonlocal_core.fold_norm` for the formulas.

        Raises:
            ValueError: if there is no norm, or the block has no parameters yet.

        Example:
            >>> block = NonLocalBlock(64, norm="batch", zero_init=False)
            >>> folded, x = block.fold_norm(), tf.random.normal((2, 9, 64))
            >>> print(folded.norm, np.allclose(folded(x), block(x), atol=1e-6))
            None True
        """
        params, spec = fold_norm(self.export_params(), self.spec)
        folded = self.from_spec(
            spec,
            method=self.method,
            data_format=self.data_format,
            name=self.name,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            autocast=self.autocast,
        )
        folded.import_params(params)
        return folded

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
        self._check(x, mask if key_mask is None else key_mask, training=False)
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
        self.spec = spec
        for name, shape in param_shapes(spec).items():
            if spec.norm != "batch" or not name.startswith("norm."):
                # Each use casts for itself: a norm is folded into W_z in full precision.
                weight = self.add_weight(shape=shape, initializer=_initializer(name, spec), name=name, autocast=False)
                # Checkpoints of TensorFlow find attributes, and pass over the values of a dict.
                setattr(self, name.replace(".", "_"), weight)
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
        norm = {} if self.norm is None else {name: getattr(self.norm, own) for name, own in _NORM_NAMES.items()}
        return {name: norm[name] if name in norm else self._own(name) for name in param_shapes(self.spec)}

    def _own(self, name: str) -> Any:
        """Return the parameter of this canonical name that the block itself holds, None if it has none."""
        return getattr(self, name.replace(".", "_"), None)

    def _first(self, a: tf.Tensor) -> tf.Tensor:
        """Return an array with channels last in the data format of the layer."""
        axes = range(a.shape.rank)
        return a if self.data_format == "channels_last" else tf.transpose(a, [0, axes[-1], *axes[1:-1]])

    def _check(self, x: Any, key_mask: Any, *, training: bool) -> None:
        check_arrays(self.spec, channels_last(x.shape, self.data_format), x, key_mask, training=training)

    def _enter(self, x: tf.Tensor, key_mask: tf.Tensor | None, *, training: bool) -> tuple[tf.Tensor, Sets]:
        """Return the checked input as `(B, S1..Sk, C)` in the compute dtype, and its sets."""
        self._check(x, key_mask, training=training)
        axes = channels_last(range(len(x.shape)), self.data_format)
        grid = tf.cast(x if self.data_format == "channels_last" else tf.transpose(x, axes), self.compute_dtype)
        sets = self.spec.sets(sizes(grid)[1:-1])
        if None in grid.shape or (key_mask is not None and None in key_mask.shape):
            checks = checks_when_run(self.spec, grid, sets, key_mask, training=training)
            with tf.control_dependencies(checks):  # or statistics would move before a check fails
                grid = tf.identity(grid)
        return grid, sets

    def _form(self) -> Form:
        """Return what says how scores become weights."""
        return form_of(self.spec, {name: self._own(name) for name in ("concat.weight", "concat.bias")})

    def _project(self, a: tf.Tensor, layer: str) -> tf.Tensor:
        """Return W a + b on the last axis, or `a` itself where the form has no such layer."""
        weight = self._own(f"{layer}.weight")
        return a if weight is None else _linear(a, weight, self._own(f"{layer}.bias"))

    def _keys(
        self, grid: tf.Tensor, sets: Sets, key_mask: tf.Tensor | None, *layers: str
    ) -> tuple[list[tf.Tensor], tf.Tensor | None]:
        """Return the pooled projections (B', M, C') of each layer and which keys are valid (B', M), for each set."""
        mask = valid = None
        if key_mask is not None:
            grid, mask = masked(grid, key_mask), cut(key_mask[..., None], sets)
            valid = pooled_mask(mask, sets)
        if self.spec.subsample_at == "input":
            pooled = pool(cut(grid, sets), sets, mask, valid)
            return [self._project(pooled, layer) for layer in layers], valid
        return [pool(cut(self._project(grid, layer), sets), sets, mask, valid) for layer in layers], valid

    def _out(self, y: tf.Tensor, *, from_batch: bool) -> tf.Tensor:
        """Return norm(W_z y + b_z), as one product unless the statistics of the norm are those of this input."""
        weights = self._canonical()
        weight, bias = weights["out.weight"], weights.get("out.bias")
        if self.spec.norm is None or from_batch:
            r = _linear(y, weight, bias)
            return self.norm(r, training=True) if from_batch else r
        gamma, beta = weights["norm.weight"], weights["norm.bias"]
        statistics = [weights[name] for name in STATISTICS if name in weights]
        return _linear(y, *folded(weight, bias, gamma, beta, statistics, self.spec.norm_epsilon))


def _linear(a: tf.Tensor, weight: Any, bias: Any) -> tf.Tensor:
    """Return W a + b on the last axis, in the dtype of `a`."""
    shape = sizes(a)
    product = tf.matmul(tf.reshape(a, [-1, shape[-1]]), tf.cast(weight, a.dtype), transpose_b=True)
    product = product if bias is None else tf.nn.bias_add(product, tf.cast(bias, a.dtype))
    return tf.reshape(product, [*shape[:-1], product.shape[-1]])


def _initializer(name: str, spec: NonLocalSpec) -> keras.initializers.Initializer:
    """Return how a parameter starts; one of its own for each, since Keras' repeat their values."""
    mean, deviation = initial_moments(name, spec)
    return keras.initializers.RandomNormal(mean, deviation) if deviation else keras.initializers.Constant(mean)
