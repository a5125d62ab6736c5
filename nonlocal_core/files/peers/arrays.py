"""Arrays of files, in the shapes that implementations give them."""

from __future__ import annotations

from typing import Any

import numpy as np

from nonlocal_core.files.peers.layouts import Style

__all__ = ["canonical", "shape_in_file"]


def shape_in_file(name: str, shape: tuple[int, ...], rank: int, style: Style) -> tuple[int, ...]:
    """Return the shape in which a file has a canonical parameter: weights are kernels of 1 on `rank` axes."""
    ones = (1,) * rank
    if name == "concat.weight":  # a convolution over the two axes of the pairs, whatever the rank
        return (1, *shape, 1, 1)
    if name == "concat.bias":
        return (1,)
    if name.startswith("norm.") or name.endswith(".bias"):
        return shape
    return (*ones, *reversed(shape)) if style.kernel_first else (*shape, *ones)


def canonical(array: np.ndarray[Any, Any], shape: tuple[int, ...], style: Style) -> np.ndarray[Any, Any]:
    """Return an array of a file in its canonical shape."""
    return array.reshape(shape[::-1]).T.copy() if style.kernel_first else array.reshape(shape)
