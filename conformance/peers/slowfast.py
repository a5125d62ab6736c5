"""The driver of SlowFast."""

from __future__ import annotations

from importlib.metadata import version

import torch
from slowfast.models import nonlocal_helper

from nonlocal_core import NonLocalSpec
from peers.video import INSTANTIATIONS, VideoPeer, video_cases

__all__ = ["Nonlocal"]


class Nonlocal(VideoPeer):
    """`slowfast.models.nonlocal_helper.Nonlocal`."""

    name = "Nonlocal"
    package = "slowfast"
    version = version(package)
    preset = "slowfast"
    norm = "bn"
    cases = video_cases(preset)

    def make(self, spec: NonLocalSpec) -> torch.nn.Module:
        """Return a new module that computes what the spec says."""
        return nonlocal_helper.Nonlocal(
            spec.channels,
            spec.inner_channels,
            pool_size=self.window(spec),
            instantiation=INSTANTIATIONS[str(spec.pairwise)],
            norm_eps=spec.norm_epsilon,
            norm_momentum=spec.norm_momentum,
        )
