"""How long it takes to import the packages."""

from __future__ import annotations

from importlib.util import find_spec

from asv_runner.benchmarks.mark import SkipNotImplemented

from measuring import journal

__all__ = ["Import"]


class Import:
    """One import in a new interpreter; beside an adapter stands the framework that it imports."""

    params = ("nonlocal_core", "nonlocal_torch", "torch", "nonlocal_jax", "jax", "nonlocal_tensorflow", "tensorflow")
    param_names = ("package",)
    rounds, repeat, warmup_time = 1, (2, 3, 10.0), 0

    def setup(self, package: str) -> None:
        """Refuse what is not installed."""
        if find_spec(package.replace("nonlocal_core", "numpy").removeprefix("nonlocal_")) is None:
            raise SkipNotImplemented(package)
        journal.begin("imports.Import", (package,))

    def timeraw_import(self, package: str) -> str:
        """Seconds of the import statement."""
        return f"import {package}"
