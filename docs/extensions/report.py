"""asv's own pages as a part of the site, at `benchmarks/report/`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

__all__ = ["setup"]

PAGES = Path(__file__).parents[2] / "benchmarks" / "html"


def check(_: Sphinx) -> None:
    """Check that there are pages.

    Raises:
        ExtensionError: if they have not been made.
    """
    if not (PAGES / "index.html").is_file():
        message = "the report of the benchmarks must be there, which `make bench-publish` makes. Got none."
        raise ExtensionError(message)


def copy(app: Sphinx, error: Exception | None) -> None:
    """Copy the pages into a site that was built."""
    if error is not None:
        return
    folder = app.outdir / "benchmarks" / "report"
    shutil.copytree(PAGES, folder, dirs_exist_ok=True)
    # The page asks for the curve of every benchmark, and asv writes those that have results.
    for name in json.loads((folder / "index.json").read_text(encoding="utf-8"))["benchmarks"]:
        curve = folder / "graphs" / "summary" / f"{name}.json"
        if not curve.exists():
            curve.write_text("[]", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("builder-inited", check)
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True}
