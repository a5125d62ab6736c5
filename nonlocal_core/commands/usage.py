"""What the commands share: the error of the user, what is installed, the options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["UsageError", "fitted", "need", "option"]


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


def fitted(table: Any, console: Any) -> Any:
    """Return what a console of rich prints for a table: cells under each other where the table is too wide for it."""
    if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
        return table
    titles = [str(column.header) for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = ("\n".join(f"{title}: {cell}" for title, cell in zip(titles, row, strict=True)) for row in rows)
    return "\n\n".join(lines) + "\n"


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
