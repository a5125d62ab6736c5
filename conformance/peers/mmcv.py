"""The drivers of mmcv, one for each of its three classes."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mmcv.cnn
import torch

from nonlocal_conformance import Case
from nonlocal_conformance.case import CHANNELS
from nonlocal_conformance.cases import SPATIAL
from nonlocal_core import NonLocalSpec
from nonlocal_core.spec.presets import preset_options
from peers.cases import preset_cases
from peers.peer import Peer, require

__all__ = ["NonLocal1d", "NonLocal2d", "NonLocal3d"]

_WINDOWS = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}
"""What its `sub_sample` pools, by rank."""


def _cases(rank: int) -> tuple[Case, ...]:
    window = 2 if len(set(_WINDOWS[rank])) == 1 else _WINDOWS[rank]
    windows = {f"{rank}d_pooled_projection": window}
    changes: dict[str, dict[str, Any]] = {"unscaled": {"scale": None}, "reduction": {"inner_channels": CHANNELS // 3}}
    return (
        *preset_cases("mmcv", rank, inner_channels=3, windows=windows, norm_epsilon=0.5, norm_momentum=0.3),
        *(Case(f"embedded_gaussian_{name}", _options(rank, change), SPATIAL[rank]) for name, change in changes.items()),
    )


def _options(rank: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return preset_options("mmcv", channels=CHANNELS, rank=rank, overrides=overrides)


class NonLocal1d(Peer):
    """`mmcv.cnn.NonLocal1d`."""

    name = "NonLocal1d"
    package = "mmcv-lite"
    version = version(package)
    preset = "mmcv"
    rank = 1
    cases = _cases(1)
    free = frozenset({"inner_channels", "norm_epsilon", "norm_momentum", "scale", "subsample", "zero_init"})

    def make(self, spec: NonLocalSpec) -> torch.nn.Module:
        """Return a new module that computes what the spec says."""
        reductions = [n for n in range(1, spec.channels + 1) if spec.channels // n == spec.inner_channels]
        require(bool(reductions), f"no `reduction` of {spec.channels} gives {spec.inner_channels} `inner_channels`")
        scales = (None, "inner") if spec.pairwise == "embedded_gaussian" else (None,)
        require(spec.scale in scales, f"its `scale` is one of {scales}. Got {spec.scale!r}.")
        windows = (None, _WINDOWS[self.rank])
        require(self.window(spec) in windows, f"its `subsample` is one of {windows}. Got {spec.subsample!r}.")
        norm = {"type": f"BN{self.rank}d", "eps": spec.norm_epsilon, "momentum": spec.norm_momentum}
        return getattr(mmcv.cnn, self.name)(
            spec.channels,
            sub_sample=spec.subsample is not None,
            reduction=reductions[0],
            use_scale=spec.scale == "inner",
            norm_cfg=None if spec.norm is None else norm,
            mode=spec.pairwise,
            zeros_init=spec.zero_init,
        )

    def layers(self, module: Any) -> dict[str, torch.nn.Module]:
        """Return the layers of a module by their canonical names."""
        names = {"theta": "theta", "phi": "phi", "g": "g", "concat": "concat_project", "out": "conv_out"}
        found: dict[str, Any] = {layer: getattr(module, name, None) for layer, name in names.items()}
        # With pooling, phi and g are a projection and a pooling; that of the Gaussian form is the pooling alone.
        found = {layer: one[0] if isinstance(one, torch.nn.Sequential) else one for layer, one in found.items()}
        layers = {layer: one.conv for layer, one in found.items() if hasattr(one, "conv")}
        return layers | ({"norm": module.conv_out.norm} if module.conv_out.with_norm else {})


class NonLocal2d(NonLocal1d):
    """`mmcv.cnn.NonLocal2d`."""

    name = "NonLocal2d"
    rank = 2
    cases = _cases(2)


class NonLocal3d(NonLocal1d):
    """`mmcv.cnn.NonLocal3d`."""

    name = "NonLocal3d"
    rank = 3
    cases = _cases(3)
