"""Checks of single arguments, and the words of every error: the argument, what must hold, what was given."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any

__all__ = [
    "Size",
    "check_bool",
    "check_boolean",
    "check_choice",
    "check_finite",
    "check_floating",
    "check_int",
    "check_sizes",
    "fail_type",
    "fail_value",
]

Size = int | None
"""A size of an axis; None where it is unknown or symbolic."""

_LONGEST = 200
"""How many characters of what was given an error shows."""


def fail_value(name: str, rule: str, got: object) -> ValueError:
    """Return the error for an argument whose value cannot serve."""
    return ValueError(f"`{name}` must {rule}. Got {got}.")


def fail_type(name: str, rule: str, got: object) -> TypeError:
    """Return the error for an argument of a wrong type; `got` is shown by its type, and an array by its shape."""
    shape = getattr(got, "shape", ())
    shown = f"shape {tuple(shape)}" if shape else repr(got)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
    return TypeError(f"`{name}` must {rule}. Got {shown} of type {type(got).__name__}.")


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


def _listed(choices: Collection[Any]) -> str:
    return ", ".join(map(repr, choices))
