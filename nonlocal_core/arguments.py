"""Checks of single arguments: numbers, words, JSON, arrays by their shape and dtype."""

from __future__ import annotations

import json
import math
import numbers
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from nonlocal_core.errors import fail_type, fail_value, shortened

__all__ = [
    "Size",
    "check_array",
    "check_bool",
    "check_boolean",
    "check_choice",
    "check_finite",
    "check_floating",
    "check_int",
    "check_positions",
    "check_sizes",
    "dtype_name",
    "known_sizes",
    "read_json",
]

Size = int | None
"""A size of an axis; None where it is unknown or symbolic."""


def check_int(name: str, value: Any, rule: str = "be a positive int", *, least: int = 1) -> int:
    """Return `value` as a Python int; it must be one, and at least `least`."""
    if _is_bool(value):
        raise fail_type(name, rule, value)
    try:
        number = operator.index(value)
    except TypeError:
        raise fail_type(name, rule, value) from None
    if number < least:
        raise fail_value(name, rule, number)
    return number


def check_bool(name: str, value: Any) -> bool:
    """Return `value` as a Python bool; NumPy's bool counts as one, an int does not."""
    if not _is_bool(value):
        raise fail_type(name, "be a bool", value)
    return bool(value)


def _is_bool(value: Any) -> bool:
    return type(value).__name__ in {"bool", "bool_"}  # NumPy's has the second name up to 2.0, and then an index too


def check_finite(name: str, value: Any, rule: str) -> float:
    """Return `value` as a Python float; it must be a real number and finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise fail_type(name, rule, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise fail_value(name, rule, number)
    return number


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """Return the one of `choices` that `value` equals: a plain string, even for NumPy's."""
    if value is not None and not isinstance(value, str):
        raise fail_type(name, f"be one of {_listed(choices)}", value)
    for choice in choices:
        if choice == value:
            return choice
    raise fail_value(name, f"be one of {_listed(choices)}", repr(value))


def read_json(text: str) -> Any:
    """Return the value that JSON text holds.

    Raises:
        ValueError: if it is not JSON, an object of it has a key twice, or it is nested deeper than Python goes.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, whose keys must differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        message = f"The key {shortened(repr(twice))} stands twice in one object"
        raise ValueError(message)
    return found


def dtype_name(array: Any) -> str:
    """Return the bare name of an array's dtype, for example "float32", for any array library."""
    return getattr(array.dtype, "name", None) or str(array.dtype).rpartition(".")[2]


def check_array(name: str, value: Any) -> None:
    """Check that an argument is an array of some library."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        message = f"`{name}` must be an array. Got {type(value).__name__}."
        raise TypeError(message)


def check_floating(name: str, dtype: str) -> None:
    """Check the name of a dtype that must be real floating point."""
    if not dtype.startswith(("float", "bfloat")):
        message = f"`{name}` must have a floating-point dtype. Got {dtype}."
        raise TypeError(message)


def check_boolean(name: str, dtype: str) -> None:
    """Check the name of a dtype that must be bool."""
    if dtype != "bool":
        message = f"`{name}` must be boolean. Got {dtype}."
        raise TypeError(message)


def check_sizes(name: str, shape: Sequence[Size], expected: Sequence[Size]) -> None:
    """Check a shape against the expected one; a size of None fits any."""
    fits = len(shape) == len(expected) and all(
        got is None or want is None or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        raise fail_value(name, f"have shape {tuple(expected)}", f"shape {tuple(shape)}")


def known_sizes(shape: Iterable[Any]) -> tuple[Size, ...]:
    """Return a shape with None for the sizes that are unknown or symbolic while a library traces a function."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def check_positions(positions: Any, queries: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return `positions` as a one-dimensional array of int64, each one of `queries` flat indices (None: unknown)."""
    try:
        array = np.asarray(positions)
    except ValueError:
        raise fail_type("positions", "be a one-dimensional sequence of ints", positions) from None
    if array.size and array.dtype.kind not in "iu":
        raise fail_type("positions", "be a one-dimensional sequence of ints", positions)
    if array.ndim != 1:
        raise fail_value("positions", "be a one-dimensional sequence of ints", f"shape {array.shape}")
    if array.size and not (array.min() >= 0 and (queries is None or array.max() < queries)):
        last = "" if queries is None else f" to {queries - 1}"
        raise fail_value("positions", f"be flat indices from 0{last}", array.tolist())
    return array.astype(np.int64)


def _listed(choices: Collection[Any]) -> str:
    return ", ".join(map(repr, choices))
