"""Other implementations of the block, from PyPI, as subjects of the conformance suite.

Each module has the drivers of one package, whose name it bears; `python -m peers` runs the suite on all of them and
prints the page of the documentation. The folder is no part of the wheel.
"""

from __future__ import annotations

import warnings
from typing import Any

from nonlocal_conformance import loader

__all__ = ["SUBJECTS", "load"]

SUBJECTS = (
    "peers.mmcv:NonLocal1d",
    "peers.mmcv:NonLocal2d",
    "peers.mmcv:NonLocal3d",
    "peers.pytorchvideo:NonLocal",
    "peers.slowfast:Nonlocal",
    "peers.timm:NonLocalAttn",
    "peers.fastreid:NonLocal",
)
"""The drivers, as `nonlocal conformance` takes them."""


def load(address: str) -> Any:
    """Return one of the drivers; what its package warns of when it is imported is no concern of the suite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loader.load(address)
