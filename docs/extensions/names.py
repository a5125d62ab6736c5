"""The check that the reference describes every public name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

__all__ = ["setup"]

PACKAGES = ("nonlocal_core", "nonlocal_torch", "nonlocal_tensorflow", "nonlocal_jax", "nonlocal_conformance")


def check(_: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names of the packages that no page describes."""
    described = env.domains.python_domain.objects
    for package in map(import_module, PACKAGES):
        for name in (f"{package.__name__}.{own}" for own in package.__all__):
            if name not in described:
                logging.getLogger(__name__).warning("no page of docs/api describes %s", name, type="names")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
