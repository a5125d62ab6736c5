"""What this machine is, and which commit is measured."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["ROOT", "git", "gpu_name", "slug", "version_of"]

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def gpu_name() -> str:
    """Return what the first GPU is."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def version_of(framework: str) -> str:
    """Return the version of a framework that is installed."""
    for name in (framework, f"{framework}-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "of unknown version"


def slug(name: str) -> str:
    """Return a name as one of a file."""
    return re.sub(r"\W+", "-", name).lower()
