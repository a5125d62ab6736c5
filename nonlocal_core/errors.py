"""The words of every error: the argument in backticks, what must hold, then what was given."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

__all__ = ["check_bool", "check_choice", "check_finite", "check_int", "fail_type", "fail_value"]


def fail_value(name: str, rule: str, got: object) -> ValueError:
    """Return the error for an argument whose value cannot serve."""
    return ValueError(f"`{name}` must {rule}. Got {got}.")


def fail_type(name: str, rule: str, got: object) -> TypeError:
    """Return the error for an argument of a wrong type; `got` is shown by its type."""
    return TypeError(f"`{name}` must {rule}. Got {got!r} of type {type(got).__name__}.")


def check_int(name: str, value: Any, rule: str = "be a positive int", *, least: int = 1) -> int:
    """Return `value` as a Python int; it must be one, and at least `least`."""
    if isinstance(value, bool):
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
    if type(value).__name__ not in {"bool", "bool_"}:
        raise fail_type(name, "be a bool", value)
    return bool(value)


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
    if not isinstance(value, str | None):
        raise fail_type(name, f"be one of {_listed(choices)}", value)
    for choice in choices:
        if choice == value:
            return choice
    raise fail_value(name, f"be one of {_listed(choices)}", repr(value))


def _listed(choices: Collection[Any]) -> str:
    return ", ".join(map(repr, choices))
