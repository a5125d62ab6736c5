"""The words of every error: the argument, what must hold, what was given."""

from __future__ import annotations

__all__ = ["fail_type", "fail_value"]

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
