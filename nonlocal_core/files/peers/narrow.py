"""Blocks of generative networks, in which theta and phi have fewer rows than g and one gain stands for gamma.

Rows of zeros in theta and phi, biases included, add nothing to a score. Nor do they train: the gradient of such a row
of theta is a sum over what the row of phi gives, zero, and the other way round; the decay of a zero is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["narrow", "widen"]

_KEYS = ("theta", "phi")


def narrow(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the arrays of such a block should have, by those of the canonical parameters."""
    inner = shapes["g.weight"][0]
    rows = min([inner, *arrays["theta.weight"].shape[:1]])
    held = {name: (rows, *shape[1:]) if name.startswith(_KEYS) else shape for name, shape in shapes.items()}
    del held["norm.bias"]
    return held | {"norm.weight": (1,) * arrays["norm.weight"].ndim}


def widen(
    params: Mapping[str, np.ndarray[Any, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return canonical parameters from those of such a block."""
    full = {
        name: np.zeros(shape, params[name.replace("norm.bias", "norm.weight")].dtype) for name, shape in shapes.items()
    }
    for name, array in params.items():
        full[name][: len(array) if name.startswith(_KEYS) else None] = array
    return full
