"""What each public implementation calls the parameters of a block in its files, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["GAN", "KERAS", "LAYOUTS", "TORCH", "Layout", "Style"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """How the files of a framework name and shape the parameters of a layer.

    Args:
        separator: what stands between the name of a block and that of a layer.
        layer: from "weight" and "bias" to what follows the name of a projection.
        norm: from "weight", "bias", "mean" and "variance" to what follows the name of a norm.
        ignored: the endings of entries that are no parameters.
        kernel_first: whether weights are (1.., in, out) instead of (out, in, 1..).
    """

    separator: str
    layer: Mapping[str, str]
    norm: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    kernel_first: bool = False


TORCH = Style(
    separator=".",
    layer={"weight": ".weight", "bias": ".bias"},
    norm={"weight": ".weight", "bias": ".bias", "mean": ".running_mean", "variance": ".running_var"},
    ignored=(".num_batches_tracked",),
)
# `riv` holds the variance, not its inverse.
_CAFFE2 = Style(
    separator="_",
    layer={"weight": "_w", "bias": "_b"},
    norm={"weight": "_s", "bias": "_b", "mean": "_rm", "variance": "_riv"},
    ignored=("_momentum",),
)
# The norm is one gain, and theta and phi have fewer rows than g; see `narrow.py`.
GAN = dataclasses.replace(TORCH, norm={"weight": ""})
KERAS = Style(separator=".", layer={"weight": ""}, kernel_first=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of the layers of one implementation.

    Args:
        layers: from each layer to its name.
        pooled: the names that differ where the block pools, if any do.
        normed: the names that differ where a norm follows the last projection, that of the norm included.
        twins: second names, under which the file holds the same values again.
        style: how its files name and shape parameters.
        free: options of the spec that its constructor takes and its keys do not show, beside the form.
        groups: from a part of the name of a block to the frames in its groups.
    """

    layers: Mapping[str, str]
    pooled: Mapping[str, str] = dataclasses.field(default_factory=dict)
    normed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    style: Style = TORCH
    free: frozenset[str] = frozenset()
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def keys(self, *, pooled: bool, normed: bool) -> dict[str, str]:
        """Return from each canonical parameter that the implementation can have to its key."""
        return self._keys({**self.layers, **(self.pooled if pooled else {}), **(self.normed if normed else {})})

    def second_keys(self, *, pooled: bool, normed: bool) -> dict[str, str]:
        """Return from some canonical parameters to the second key that holds the same."""
        keys = self.keys(pooled=pooled, normed=normed)
        return {name: twin for name, twin in self._keys(self.twins).items() if name in keys and twin != keys[name]}

    def _keys(self, layers: Mapping[str, str]) -> dict[str, str]:
        return {
            f"{layer}.{attribute}": name + ending
            for layer, name in layers.items()
            for attribute, ending in (self.style.norm if layer == "norm" else self.style.layer).items()
        }


_OFFICIAL = Layout(
    layers={"theta": "theta", "phi": "phi", "g": "g", "out": "out"},
    normed={"norm": "bn"},
    style=_CAFFE2,
    free=frozenset({"group_size"}),
)
_VIDEO = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "out": "conv_out"}
_PLAIN = {"theta": "theta", "phi": "phi", "g": "g"}
_SPECTRAL = {layer: f"snconv1x1_{layer}" for layer in _PLAIN}
_MMCV = Layout(
    layers={
        "theta": "theta.conv",
        "phi": "phi.conv",
        "g": "g.conv",
        "concat": "concat_project.conv",
        "out": "conv_out.conv",
    },
    pooled={"phi": "phi.0.conv", "g": "g.0.conv"},
    normed={"norm": "conv_out.bn"},
    free=frozenset({"scale", "norm_epsilon"}),
)

LAYOUTS: Mapping[str, Layout] = {
    "official": _OFFICIAL,
    "official_affine": dataclasses.replace(_OFFICIAL, groups={"nonlocal_conv3_": 4}),
    "slowfast": Layout(
        layers=_VIDEO, normed={"norm": "bn"}, free=frozenset({"subsample", "group_size", "norm_epsilon"})
    ),
    "pytorchvideo": Layout(layers=_VIDEO, normed={"norm": "norm"}, free=frozenset({"subsample", "norm_epsilon"})),
    "pytorch_resnet3d": Layout(layers={**_PLAIN, "out": "out"}, normed={"norm": "bn"}),
    "mmcv": _MMCV,
    "alexhex7": Layout(
        layers={**_PLAIN, "concat": "concat_project.0", "out": "W"},
        pooled={"phi": "phi.0", "g": "g.0"},
        normed={"out": "W.0", "norm": "W.1"},
    ),
    "tea1528": Layout(
        layers={**_PLAIN, "concat": "W_f.0", "out": "W_z"},
        normed={"out": "W_z.0", "norm": "W_z.1"},
    ),
    "timm": Layout(
        layers={"theta": "t", "phi": "p", "g": "g", "out": "z"}, normed={"norm": "norm"}, free=frozenset({"scale"})
    ),
    "gluon": Layout(
        layers={**_PLAIN, "out": "W"},
        pooled={"phi": "sub_phi.0", "g": "sub_g.0"},
        normed={"out": "W_bn.0", "norm": "W_bn.1"},
        twins={"phi": "phi", "g": "g", "out": "W", "norm": "bn"},
        free=frozenset({"norm_epsilon"}),
    ),
    "mmdet2019": dataclasses.replace(_MMCV, pooled={}),
    "sagan": Layout(layers={**_SPECTRAL, "out": "snconv1x1_attn"}, normed={"norm": "sigma"}, style=GAN),
    "biggan": Layout(layers={**_PLAIN, "out": "o"}, normed={"norm": "gamma"}, style=GAN),
    "pretrained_biggan": Layout(layers={**_SPECTRAL, "out": "snconv1x1_o_conv"}, normed={"norm": "gamma"}, style=GAN),
    "keras_nonlocal": Layout(layers={**_PLAIN, "out": "out"}, style=KERAS),
}
"""The implementations, by the names of their presets; of those with the same keys the first is found."""
