"""Links of pages that are read in the repository too, changed to those of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

__all__ = ["setup"]

RULES = {
    r"\]\((?:\.\./)?README\.md": "](index.md",
    r"\]\((?:\.\./)?CONTRIBUTING\.md": "](contributing.md",
    r"\]\((?:\.\./)?CHANGELOG\.md": "](changelog.md",
    r"\]\((?:\.\./)?examples/(\w+)\.py": r"](guides/\1.rst",
    r"\]\(docs/": "](",
}
"""From how the target of a link begins in the repository to how it begins here."""


def change(content: list[str]) -> None:
    """Change the links of a text, which is the only item of a list."""
    for pattern, here in RULES.items():
        content[0] = re.sub(pattern, here, content[0])


def read_page(_: Sphinx, __: str, content: list[str]) -> None:
    """Change the links of a page."""
    change(content)


def read_part(_: Sphinx, __: Path, ___: str, content: list[str]) -> None:
    """Change the links of a file that a page includes."""
    change(content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_part)
    return {"parallel_read_safe": True}
