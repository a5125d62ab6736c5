"""The driver of timm."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from nonlocal_conformance import Case
from nonlocal_conformance.case import CHANNELS
from nonlocal_conformance.cases import SPATIAL
from nonlocal_core import NonLocalSpec
from nonlocal_core.spec.presets import preset_options
from peers.cases import preset_cases
from peers.peer import Peer, require

try:
    import_module("torchvision")
except RuntimeError:
    # Its wheel on PyPI is built for CUDA: beside a PyTorch for the CPU it lacks its operators, which the block does
    # not use, and cannot be imported unless they are declared.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.layers import NonLocalAttn as Block

__all__ = ["NonLocalAttn"]

_UNSCALED = preset_options("timm", channels=CHANNELS, rank=2, overrides={"inner_channels": 5, "scale": None})


class NonLocalAttn(Peer):
    """`timm.layers.NonLocalAttn`."""

    name = "NonLocalAttn"
    package = "timm"
    version = version(package)
    preset = "timm"
    rank = 2
    cases = (
        *preset_cases(preset, rank, inner_channels=5, windows={}),
        Case("embedded_gaussian_unscaled", _UNSCALED, SPATIAL[2]),
    )
    free = frozenset({"inner_channels", "scale"})

    def make(self, spec: NonLocalSpec) -> torch.nn.Module:
        """Return a new module that computes what the spec says."""
        require(spec.scale in {None, "input"}, f"its `scale` is None or 'input'. Got {spec.scale!r}.")
        return Block(spec.channels, use_scale=spec.scale == "input", rd_channels=spec.inner_channels)

    def layers(self, module: Any) -> dict[str, torch.nn.Module]:
        """Return the layers of a module by their canonical names."""
        return {"theta": module.t, "phi": module.p, "g": module.g, "out": module.z, "norm": module.norm}
