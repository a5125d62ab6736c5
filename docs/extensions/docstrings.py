"""Docstrings of properties as they are written: napoleon takes what stands before a colon for a type."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

__all__ = ["setup"]

BEFORE_NAPOLEON = 499


def keep(_: Sphinx, what: str, __: str, ___: object, ____: object, lines: list[str]) -> None:
    """Let the first line, in which napoleon looks for a type, be an empty comment."""
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("autodoc-process-docstring", keep, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True}
