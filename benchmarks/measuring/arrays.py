"""The arrays of a case, the same for every backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from nonlocal_core import NonLocalSpec, param_shapes

__all__ = ["input_of", "params_of", "positions_of"]

Array = np.ndarray[Any, Any]

ROWS = 64
"""How many rows of the weights are asked for."""


def input_of(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Return a float32 input, channels last."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(spec: NonLocalSpec) -> dict[str, Array]:
    """Return float32 parameters of which none is zero."""
    rng = np.random.default_rng(1)
    return {name: _parameter(name, shape, rng).astype(np.float32) for name, shape in param_shapes(spec).items()}


def positions_of(count: int) -> list[int]:
    """Return the flat indices of some positions, spread over all of them."""
    return np.linspace(0, count - 1, min(ROWS, count), dtype=int).tolist()


def _parameter(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if name == "norm.variance":
        return rng.uniform(0.5, 2.0, shape)
    if name == "norm.weight":  # what the block adds is far larger than its input, or the error would be that of the sum
        return rng.uniform(50.0, 150.0, shape)
    return rng.normal(size=shape) / np.sqrt(shape[-1])
