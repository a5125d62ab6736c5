"""The non-local block as a Keras layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import keras
import tensorflow as tf

from nonlocal_core.arguments import check_array, check_bool, check_choice, check_int, check_positions
from nonlocal_core.errors import fail_value
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.form import form_of
from nonlocal_core.spec.options import check_options
from nonlocal_tensorflow.arrays import flat, masked, sizes
from nonlocal_tensorflow.configuration import KerasBlock
from nonlocal_tensorflow.embed import among_all_keys, embed, result, set_numbers, uncut
from nonlocal_tensorflow.layers import BlockOptions, parted
from nonlocal_tensorflow.linear import linear
from nonlocal_tensorflow.methods.pairwise import pairwise_weights
from nonlocal_tensorflow.op import aggregate
from nonlocal_tensorflow.sharded import replicas

__all__ = ["NonLocalBlock"]


@keras.saving.register_keras_serializable(package="nonlocal_tensorflow")
class NonLocalBlock(KerasBlock):
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
        synchronized: whether batch normalisation takes its statistics from all replicas of a distribution strategy.
        sharded_axis: experimental. The spatial axis, 0 the first, along which the replicas of a distribution strategy
            cut the positions: in `strategy.run` each gives the block its part of the same samples, and gets that part
            of z. Keys are shared, and statistics are those of all replicas. None, one replica, or a call outside of
            `strategy.run`: the input is whole.
        name: the name of the layer.
        dtype: the dtype or the dtype policy of the layer.
        trainable: whether the parameters are trained.
        autocast: whether Keras casts the input, and so z, to the compute dtype. If not, the operands alone are cast.
        **options: the other options of `nonlocal_core.NonLocalSpec`; also `kernel_initializer`, `bias_initializer`,
            `kernel_regularizer`, `bias_regularizer`, `kernel_constraint` and `bias_constraint` of
            `keras.layers.Dense`, for theta, phi, g and out. None: none, and the start of the specification; where
            `zero_init` has `out` start at 0, it does in any case.

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

    def __init__(
        self,
        channels: int | None = None,
        *,
        method: str = "auto",
        data_format: str | None = None,
        synchronized: bool = False,
        sharded_axis: int | None = None,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        autocast: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        """Create the parameters if `channels` is known; see the class for the arguments."""
        check_options(type(self), options, BlockOptions.__annotations__)
        check_bool("autocast", autocast)
        super().__init__(name=name, dtype=dtype, trainable=trainable, autocast=autocast)
        data_format = keras.config.image_data_format() if data_format is None else data_format
        self.data_format = check_choice("data_format", data_format, ("channels_last", "channels_first"))
        self.method, self.channels, self.synchronized = method, channels, synchronized
        if sharded_axis is not None:
            sharded_axis = check_int("sharded_axis", sharded_axis, "be an int of at least 0", least=0)
        self.sharded_axis = sharded_axis
        self.supports_masking = True
        own, given = parted(options)
        self._spec_of, self._given = partial(NonLocalSpec, **own), partial(keras.layers.Dense, **given)
        spec = self._spec_of(channels=1 if channels is None else channels)  # refuses wrong options in any case
        check_method(method, spec.pairwise)
        self.pairwise = spec.pairwise if isinstance(spec.pairwise, keras.Layer) else None
        if channels is not None:
            self._create(spec)
            self.built = True

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
        check_array("x", x)
        if training is not None:
            check_bool("training", training)
        own = bool(training) and self.norm is not None and self.norm.trainable  # statistics of this input
        embedded = embed(self, x, mask if key_mask is None else key_mask, training=own)
        (theta, phi, g), form = embedded.arrays, form_of(self.spec, self.own_params())
        summed = aggregate if embedded.spread is None else embedded.spread.aggregate
        y = summed(theta, phi, g, form, embedded.valid, self.method, gradients=bool(training))
        return result(self, y, x, embedded, training=own)

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
        check_array("x", x)
        if self.sharded_axis is not None and replicas() > 1:
            raise fail_value(
                "x", "be whole, and so `key_mask`, for rows of weights, outside of `strategy.run`", x.shape
            )
        if self.spec is None:
            self.build(x.shape)
        form = form_of(self.spec, self.own_params())
        embedded = embed(self, x, key_mask, ("phi",) if form.is_named else ("theta", "phi"), training=False)
        sets, phi, mask = embedded.sets, embedded.arrays[-1], embedded.valid
        phi = phi if mask is None else masked(phi, mask)
        rows, chosen = flat(embedded.grid), None
        if positions is not None:
            chosen = check_positions(positions, rows.shape[1])
        if form.is_named:
            queries, keys = set_numbers(sets)
            queries, rows = _chosen(queries, chosen, 0), _chosen(rows, chosen)
            valid = tf.expand_dims(tf.expand_dims(queries, 1) == keys, 0)
            if mask is not None:
                valid &= tf.linalg.matrix_transpose(uncut(tf.expand_dims(mask, -1), sets, sets.key_sizes))
            theta, phi = linear(rows, self.theta, sizes(rows)[:-1]), uncut(phi, sets, sets.key_sizes)
            weights = pairwise_weights(theta, phi, form, valid)
        else:  # a function gets what it gets in `call`: all queries and keys of a set
            valid = None if mask is None else tf.expand_dims(mask, 1)
            weights = among_all_keys(pairwise_weights(embedded.arrays[0], phi, form, valid), sets)
            weights = _chosen(weights, chosen)
        weights = tf.cast(weights, x.dtype)
        if embedded.lost is None:
            return weights
        lost = tf.reshape(embedded.lost, [*sizes(embedded.grid)[:1], -1, 1])
        lost = tf.cast(_chosen(lost, chosen), x.dtype)
        return tf.where(tf.math.is_nan(lost), lost, weights)


def _chosen(a: tf.Tensor, chosen: Any, axis: int = 1) -> tf.Tensor:
    """Return the entries of an axis that are chosen, all of them for None."""
    return a if chosen is None else tf.gather(a, chosen, axis=axis)
