"""The driver of PyTorchVideo."""

from __future__ import annotations

from importlib.metadata import version

import torch
from pytorchvideo.layers.nonlocal_net import create_nonlocal

from nonlocal_core import NonLocalSpec
from peers.video import INSTANTIATIONS, VideoPeer, video_cases

__all__ = ["NonLocal"]


class NonLocal(VideoPeer):
    """`pytorchvideo.layers.nonlocal_net.NonLocal`."""

    name = "NonLocal"
    package = "pytorchvideo"
    version = version(package)
    preset = "pytorchvideo"
    norm = "norm"
    cases = video_cases(preset)

    def make(self, spec: NonLocalSpec) -> torch.nn.Module:
        """Return a new module that computes what the spec says."""
        return create_nonlocal(
            dim_in=spec.channels,
            dim_inner=spec.inner_channels,
            pool_size=self.window(spec),
            instantiation=INSTANTIATIONS[str(spec.pairwise)],
            norm=None if spec.norm is None else torch.nn.BatchNorm3d,
            norm_eps=spec.norm_epsilon,
            norm_momentum=spec.norm_momentum,
        )
