"""What the block of every framework does with its parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.networks.folding import fold_norm
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.parameters import check_params

__all__ = ["CanonicalBlock"]


class CanonicalBlock:
    """A block whose parameters travel under their canonical names; a framework says where they live."""

    spec: NonLocalSpec

    @abstractmethod
    def _canonical(self) -> Mapping[str, Any]:
        """Return the live parameters and statistics under their canonical names."""

    @abstractmethod
    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over the values of all parameters, which fit."""

    @abstractmethod
    def _like(self, spec: NonLocalSpec) -> Self:
        """Return a new block that computes `spec` and is like this one in all else."""

    def export_params(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return a copy of the parameters under their canonical names, as NumPy arrays (bfloat16 as float32)."""
        return {name: to_numpy(name, value) for name, value in self._canonical().items()}

    def import_params(self, params: Mapping[str, Any]) -> None:
        """Take over parameters under their canonical names; nothing changes if they do not fit.

        Args:
            params: a mapping from exactly the names of `nonlocal_core.param_shapes(self.spec)` to arrays.

        Raises:
            TypeError: if `params` is not a mapping.
            ValueError: if a parameter is missing or unknown, or has a wrong shape, or the block has none yet.
        """
        self._canonical()  # a block that has no parameters yet says so
        check_params(params, self.spec)
        self._assign({name: to_numpy(f"params[{name!r}]", params[name]) for name in params})

    def fold_norm(self) -> Self:
        """Return a new block without norm that computes what this one computes in evaluation.

        In all else it is like this one; see `nonlocal_core.fold_norm` for the formulas.

        Raises:
            ValueError: if there is no norm, or the block has no parameters yet.
        """
        params, spec = fold_norm(self.export_params(), self.spec)
        folded = self._like(spec)
        folded.import_params(params)
        return folded
