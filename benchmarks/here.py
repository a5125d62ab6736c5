"""A plugin of asv: the environment that is there already, under a name that does not tell where it lies."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from asv.environment import ExistingEnvironment

__all__ = ["PACKAGES", "Here"]

PACKAGES = (
    "flax",
    "jax",
    "keras",
    "mmcv-lite",
    "numpy",
    "pytorchvideo",
    "slowfast",
    "tensorflow",
    "tensorflow-cpu",
    "timm",
    "torch",
)
"""The packages whose versions are kept with the results."""

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Here(ExistingEnvironment):  # type: ignore[misc]  # asv has no types
    """The interpreter that runs asv, or the one that is named, with what is installed for it."""

    tool_name = "here"

    def __init__(self, conf: Any, executable: str, requirements: dict[str, str], tagged_env_vars: Any) -> None:
        """Take the interpreter, and the versions of what is installed."""
        super().__init__(conf, executable, requirements, tagged_env_vars)
        self._python, self._requirements = _PYTHON, _versions()

    @property
    def name(self) -> str:
        """The name in the files of results."""
        return f"python{_PYTHON}"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package.removesuffix("-cpu")] = version(package)
    return found
