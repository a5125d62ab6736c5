"""What the drivers of PyTorchVideo and SlowFast share: both continue one implementation, with its names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from nonlocal_conformance import Case
from peers.cases import preset_cases
from peers.peer import Peer

__all__ = ["INSTANTIATIONS", "VideoPeer", "video_cases"]

INSTANTIATIONS = {"embedded_gaussian": "softmax", "dot_product": "dot_product"}
"""What the packages call their two forms."""


def video_cases(preset: str) -> tuple[Case, ...]:
    """Return the cases of one of the packages."""
    windows = {"3d_pooled_input": 2, "pooled_frames": (1, 2, 2)}
    return preset_cases(preset, 3, inner_channels=5, windows=windows, norm_epsilon=0.5, norm_momentum=0.3)


class VideoPeer(Peer):
    """A driver of one of the packages."""

    rank = 3
    norm: ClassVar[str]
    """The attribute that is the norm."""
    free = frozenset({"inner_channels", "norm_epsilon", "norm_momentum", "subsample"})

    def layers(self, module: Any) -> dict[str, torch.nn.Module]:
        """Return the layers of a module by their canonical names."""
        layers = {layer: getattr(module, f"conv_{layer}") for layer in ("theta", "phi", "g", "out")}
        norm = getattr(module, self.norm)
        return layers if norm is None else layers | {"norm": norm}
