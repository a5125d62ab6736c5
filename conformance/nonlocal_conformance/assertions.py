"""Comparisons that look at shape, dtype and finiteness before they look at values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["EPSILONS", "assert_close", "assert_same", "largest"]

Array = np.ndarray[Any, Any]

EPSILONS = 64.0
"""How many units of the dtype's eps a result may differ by, relative to the largest value in question."""


def eps_of(dtype: Any) -> float:
    """Return the distance from 1 to the next number of a dtype."""
    if np.dtype(dtype).name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(dtype).eps)


def largest(*arrays: Any) -> float:
    """Return the largest absolute value of all the arrays, 0 if they are empty."""
    return max((float(np.max(np.abs(a))) for a in arrays if np.size(a)), default=0.0)


def assert_close(
    name: str, actual: Any, expected: Array, *, dtype: Any, scale: float | None = None, epsilons: float = EPSILONS
) -> None:
    """Assert that `actual` is an array of `dtype` equal to `expected` up to rounding.

    Args:
        name: what is compared, for the message.
        actual: the result.
        expected: the reference's result, float64.
        dtype: the dtype that `actual` must have; its eps sets the tolerance.
        scale: what the tolerance is relative to; None: the largest expected value.
        epsilons: the tolerance in units of eps.
    """
    _assert_array(name, actual, expected.shape, dtype)
    actual = np.asarray(actual, dtype=np.float64)
    if not np.isfinite(actual).all():
        message = f"{name} is not finite: {np.count_nonzero(~np.isfinite(actual))} of {actual.size} values"
        raise AssertionError(message)
    bound = epsilons * eps_of(dtype) * (largest(expected) if scale is None else scale)
    worst = largest(actual - expected)
    if worst > bound:
        where = np.unravel_index(np.argmax(np.abs(actual - expected)), expected.shape)
        message = (
            f"{name} differs from the reference by {worst:.3g}, allowed are {bound:.3g}; "
            f"at {tuple(map(int, where))}: {actual[where]:.9g}, expected {expected[where]:.9g}"
        )
        raise AssertionError(message)


def assert_same(name: str, actual: Any, expected: Array) -> None:
    """Assert that two arrays are equal bit for bit, in shape and dtype too."""
    _assert_array(name, actual, expected.shape, expected.dtype)
    if not np.array_equal(actual, expected, equal_nan=True):
        changed = np.count_nonzero(np.asarray(actual) != expected)
        message = f"{name} must be exactly equal, and differs in {changed} of {expected.size} values"
        raise AssertionError(message)


def assert_names(name: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Assert that two mappings have the same keys."""
    if set(actual) != set(expected):
        message = f"{name} must have {sorted(expected)}, and has {sorted(actual)}"
        raise AssertionError(message)


def _assert_array(name: str, actual: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if not isinstance(actual, np.ndarray | np.generic):
        message = f"{name} must be a NumPy array, and is {type(actual).__name__}"
        raise AssertionError(message)
    if actual.shape != shape:
        message = f"{name} must have shape {shape}, and has {actual.shape}"
        raise AssertionError(message)
    if actual.dtype != np.dtype(dtype):
        message = f"{name} must have dtype {np.dtype(dtype)}, and has {actual.dtype}"
        raise AssertionError(message)
