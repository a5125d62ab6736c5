"""Comparisons that look at shape, dtype and finiteness before they look at values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["EPSILONS", "assert_close", "assert_names", "assert_same", "assert_within", "largest", "require"]

Array = np.ndarray[Any, Any]

EPSILONS = 64.0
"""How many units of the dtype's eps a result may differ by, relative to the largest value in question."""


def require(holds: bool, message: str) -> None:
    """Raise AssertionError with `message` unless `holds`, also where Python drops assert statements."""
    if not holds:
        raise AssertionError(message)


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
    wrong = np.count_nonzero(~np.isfinite(actual))
    require(not wrong, f"{name} is not finite: {wrong} of {actual.size} values")
    if not actual.size:
        return
    bound = epsilons * eps_of(dtype) * (largest(expected) if scale is None else scale)
    difference = np.abs(actual - expected)
    where = np.unravel_index(np.argmax(difference), expected.shape)
    require(
        bool(difference[where] <= bound),
        f"{name} differs from the reference by {difference[where]:.3g}, allowed are {bound:.3g}; "
        f"at {tuple(map(int, where))}: {actual[where]:.9g}, expected {expected[where]:.9g}",
    )


def assert_within(name: str, actual: Any, expected: Array, bound: Any, *, dtype: Any = np.float32) -> None:
    """Assert that `actual` is an array of `dtype` within a bound on its error, one for each value or one for all."""
    assert_close(
        name, actual, expected, dtype=dtype, scale=1.0, epsilons=np.inf
    )  # its shape and dtype, and that it is finite
    worst = float((np.abs(np.asarray(actual, np.float64) - expected) / bound).max())
    require(worst <= 1, f"{name} exceeds its error bound by a factor of {worst:.3g}")


def assert_same(name: str, actual: Any, expected: Array) -> None:
    """Assert that two arrays are equal bit for bit, in shape and dtype too."""
    _assert_array(name, actual, expected.shape, expected.dtype)
    changed = np.count_nonzero(np.asarray(actual) != expected)
    require(not changed, f"{name} must be exactly equal, and differs in {changed} of {expected.size} values")


def assert_names(name: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Assert that two mappings have the same keys."""
    require(set(actual) == set(expected), f"{name} must have {sorted(expected)}, and has {sorted(actual)}")


def _assert_array(name: str, actual: Any, shape: tuple[int, ...], dtype: Any) -> None:
    is_array = isinstance(actual, np.ndarray | np.generic)
    require(is_array, f"{name} must be a NumPy array, and is {type(actual).__name__}")
    require(actual.shape == shape, f"{name} must have shape {shape}, and has {actual.shape}")
    require(actual.dtype == np.dtype(dtype), f"{name} must have dtype {np.dtype(dtype)}, and has {actual.dtype}")
