"""Pictures that scripts of `docs/figures` draw when the site is built."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.display import status_iterator

__all__ = ["setup"]

FOLDER = Path(__file__).parents[1] / "figures"


def draw(_: Sphinx) -> None:
    """Run each script that is newer than the oldest of its pictures.

    Raises:
        ExtensionError: if a script fails or draws nothing.
    """
    made = FOLDER / "made"
    made.mkdir(exist_ok=True)
    scripts = [script for script in sorted(FOLDER.glob("*.py")) if is_due(script, made)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda script: (script, run(script, made)), scripts)
        runs = list(
            status_iterator(runs, "drawing figures... ", length=len(scripts), stringify_func=lambda one: one[0].stem)
        )
    for script, done in runs:
        if done.returncode != 0 or is_due(script, made):
            message = f"figures/{script.name} must write {script.stem}*. Got status {done.returncode}: {done.stderr}"
            raise ExtensionError(message)


def run(script: Path, made: Path) -> subprocess.CompletedProcess[str]:
    """Run a script."""
    return subprocess.run([sys.executable, script, made], capture_output=True, text=True, check=False)


def is_due(script: Path, made: Path) -> bool:
    """Return whether a script has no picture, or an older one."""
    times = [picture.stat().st_mtime for picture in made.glob(f"{script.stem}*")]
    return not times or min(times) < script.stat().st_mtime


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True}
