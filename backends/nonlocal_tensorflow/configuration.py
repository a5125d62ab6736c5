"""What Keras asks of the block: shapes, and a configuration from which an equal layer is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack

import keras

from nonlocal_core.arguments import Size
from nonlocal_core.errors import fail_value
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.block import options_of
from nonlocal_core.spec.calls import check_arrays
from nonlocal_tensorflow.arrays import channels_last
from nonlocal_tensorflow.layers import LAYERS, DenseOptions, LayeredBlock
from nonlocal_tensorflow.sharded import check_cut

__all__ = ["KerasBlock"]


class KerasBlock(LayeredBlock):
    """A Keras layer whose shapes and configuration follow from a spec."""

    channels: int | None
    method: str
    _spec_of: partial[NonLocalSpec]

    @classmethod
    def from_spec(
        cls,
        spec: NonLocalSpec,
        *,
        method: str = "auto",
        data_format: str | None = None,
        synchronized: bool = False,
        sharded_axis: int | None = None,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        autocast: bool = True,
        **given: Unpack[DenseOptions],
    ) -> Self:
        """Return a new block that computes `spec`."""
        own = {"method": method, "data_format": data_format, "synchronized": synchronized, "sharded_axis": sharded_axis}
        keras_own = {"name": name, "dtype": dtype, "trainable": trainable, "autocast": autocast}
        return cls(**options_of(spec), **own, **keras_own, **given)

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
        if self.sharded_axis is not None:
            check_cut(spec, self.sharded_axis, shape, self.norm)
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
        shape = channels_last(x.shape, self.data_format)
        check_arrays(self.spec, shape, x, key_mask, training=False)
        if self.pairwise is not None and not self.pairwise.built:
            sizes: tuple[Size, Size] = (None, None)
            if None not in shape[1:-1]:
                sets = self.spec.sets(shape[1:-1])
                sizes = math.prod(sets.inner_sizes), math.prod(sets.key_sizes)
            self.pairwise(*(keras.KerasTensor((None, size, self.spec.inner_channels)) for size in sizes))
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, from which Keras makes an equal layer.

        Raises:
            ValueError: if `pairwise` is a function, and no layer.
        """
        spec = self._spec_of(channels=1 if self.channels is None else self.channels)
        inner, own = self._spec_of.keywords.get("inner_channels"), {}
        if self.pairwise is not None:
            own = {"pairwise": keras.saving.serialize_keras_object(self.pairwise), "normalize": spec.normalize}
            spec = spec.replace(pairwise="dot_product", normalize=None)
        layers = {name: layer for name in LAYERS if (layer := getattr(self, name)) is not None}
        changed = {
            name: keras.saving.serialize_keras_object(layer)
            for name, layer in layers.items()
            if self.spec is not None and _told(layer.get_config()) != _told(self.new_layer(name).get_config())
        }
        return {
            **super().get_config(),
            **json.loads(spec.to_json()),
            **own,
            **{key: keras.saving.serialize_keras_object(one) for key, one in self._given.keywords.items()},
            **({"layers": changed} if changed else {}),
            "channels": None if self.channels is None else spec.channels,
            "inner_channels": None if inner is None else spec.inner_channels,
            "method": self.method,
            "data_format": self.data_format,
            "synchronized": self.synchronized,
            "sharded_axis": self.sharded_axis,
            "autocast": self.autocast,
            "needs": "import nonlocal_tensorflow",  # Keras shows it where the class of the block is unknown
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the layer of a configuration."""
        config, made = dict(config), keras.saving.deserialize_keras_object
        layers, _ = config.pop("layers", {}), config.pop("needs", None)
        if isinstance(config["pairwise"], Mapping):
            config["pairwise"] = made(config["pairwise"])
        block = cls(**config)
        for name, layer in layers.items():
            setattr(block, name, made(layer))
        return block

    def _like(self, spec: NonLocalSpec) -> Self:
        """Return a new block that computes `spec` and is like this one in all else."""
        return self.from_spec(
            spec,
            method=self.method,
            data_format=self.data_format,
            synchronized=self.synchronized,
            sharded_axis=self.sharded_axis,
            name=self.name,
            dtype=self.dtype_policy,
            trainable=self.trainable,
            autocast=self.autocast,
            **self._given.keywords,
        )


def _told(config: Any) -> Any:
    """Return a configuration without the numbers that Keras gives to objects while it saves."""
    if not isinstance(config, Mapping):
        return config
    return {name: _told(value) for name, value in config.items() if name != "shared_object_id"}
