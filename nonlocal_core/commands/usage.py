"""What the commands share: the error of the user, what is installed, the options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["UsageError", "need", "option"]


class UsageError(Exception):
    """What the user can put right; shown as one line."""


def need(extra: str, *modules: str) -> None:
    """Check that the modules that a command imports are there.

    Args:
        extra: the extra of this distribution that installs them.
        *modules: their import names.

    Raises:
        UsageError: if one cannot be imported; it says what to install.

    Example:
        >>> need("demo", "json")
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f'this command needs {module!r}: pip install "nonlocal-core[{extra}]" ({error})'
            raise UsageError(message) from error


def option(convert: Callable[[str], Any], holds: Callable[[Any], bool], rule: str) -> Callable[[str], Any]:
    """Return what `type=` of an option takes: a conversion and a condition.

    Args:
        convert: makes the value; it raises a ValueError for text that is none.
        holds: whether the value can serve.
        rule: what must hold, in words.

    Returns:
        A function from the text of the option to its value.

    Example:
        >>> option(int, lambda value: value > 0, "be a positive int")("3")
        3
    """

    def parse(text: str) -> Any:
        try:
            value = convert(text)
            if holds(value):
                return value
        except ValueError:
            pass
        message = f"must {rule}. Got {text!r}."
        raise argparse.ArgumentTypeError(message)

    return parse
