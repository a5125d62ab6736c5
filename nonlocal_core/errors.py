"""The words of every error: the argument, what must hold, what was given."""

from __future__ import annotations

__all__ = ["fail_type", "fail_value", "shortened"]


def shortened(text: str, longest: int = 1000) -> str:
    """Return the beginning of a text on one line, and whether it goes on."""
    line = " ".join(text[: longest + 1].splitlines())
    return line if len(text) <= longest else f"{line[:longest]}..."


def fail_value(name: str, rule: str, got: object) -> ValueError:
    """Return the error for an argument whose value cannot serve."""
    return ValueError(f"`{name}` must {rule}. Got {shortened(str(got))}.")


def fail_type(name: str, rule: str, got: object) -> TypeError:
    """Return the error for an argument of a wrong type; `got` is shown by its type, and an array by its shape."""
    shape = getattr(got, "shape", ())
    shown = f"shape {tuple(shape)}" if shape else repr(got)
    return TypeError(f"`{name}` must {rule}. Got {shortened(shown, 200)} of type {type(got).__name__}.")
