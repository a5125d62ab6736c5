"""The driver of FastReID."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from fastreid.layers.non_local import Non_local as Block

from nonlocal_conformance import Case
from nonlocal_conformance.cases import SPATIAL
from nonlocal_core import NonLocalSpec
from nonlocal_core.spec.options import PAIRWISE
from peers.peer import Peer

__all__ = ["NonLocal"]


def _cases() -> tuple[Case, ...]:
    """Return cases in evaluation: with one inner channel, batch norm in training cancels what W_z does."""
    options = {"norm": "batch", "inner_channels": 1}
    half = {"norm": "batch", "pairwise": "dot_product", "inner_channels": None}
    return (
        *(Case(f"{form}_default", {**options, "pairwise": form}, SPATIAL[2]) for form in PAIRWISE),
        Case("dot_product_half", half, SPATIAL[2]),
    )


class NonLocal(Peer):
    """`fastreid.layers.non_local.Non_local`."""

    name = "NonLocal"
    package = "fastreid"
    version = version(package)
    rank = 2
    cases = _cases()
    free = frozenset()

    def own(self, spec: NonLocalSpec) -> NonLocalSpec:
        """Return the spec that comes nearest; the module has one inner channel, whatever `reduc_ratio` is."""
        return NonLocalSpec(channels=spec.channels, inner_channels=1, pairwise="dot_product", norm="batch")

    def make(self, spec: NonLocalSpec) -> torch.nn.Module:
        """Return a new module that computes what the spec says."""
        return Block(spec.channels, "BN")

    def layers(self, module: Any) -> dict[str, torch.nn.Module]:
        """Return the layers of a module by their canonical names."""
        return {"theta": module.theta, "phi": module.phi, "g": module.g, "out": module.W[0], "norm": module.W[1]}
