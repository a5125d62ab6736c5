"""Where a file has the parameters of a layer; a weight under spectral normalisation is held as it was before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_sizes
from nonlocal_core.errors import fail_value
from nonlocal_core.files.conversion import to_numpy

__all__ = ["Source", "sources_of"]

# What follows the name of a layer: the weight, u, and a third; PyTorch's hook, its parametrisation, BigGAN-PyTorch.
_SPECTRAL = (
    (".weight_orig", ".weight_u", ".weight_v"),
    (".parametrizations.weight.original", ".parametrizations.weight.0._u", ".parametrizations.weight.0._v"),
    (".weight", ".u0", ".sv0"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """An array of a file.

    Args:
        key: its key.
        u: the key of its left singular vector, if the layer divides it by its largest singular value.
        v: the key of the right one; where there is none, the layer makes it from `u`.
    """

    key: str
    u: str | None = None
    v: str | None = None

    @property
    def label(self) -> str:
        """What errors call the array."""
        return _label(self.key)

    def read(self, state_dict: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Return a copy of the array, as the layer computes with it in evaluation."""
        array = to_numpy(self.label, state_dict[self.key])
        if self.u is None or array.ndim == 0:  # the shape is refused later
            return array
        matrix = array.reshape(len(array), -1).astype(np.float64)
        u = to_numpy(_label(self.u), state_dict[self.u])
        check_sizes(_label(self.u), u.shape, (1,) * (u.ndim - 1) + matrix.shape[:1])
        if self.v is None:
            v = u.reshape(-1) @ matrix
            v /= np.linalg.norm(v)
            factor = float(np.linalg.norm(matrix @ v))
        else:
            v = to_numpy(_label(self.v), state_dict[self.v])
            check_sizes(_label(self.v), v.shape, matrix.shape[1:])
            factor = float(u @ matrix @ v)
        if not 0 < abs(factor) < np.inf:
            rule = f"tell the largest singular value of {self.label}, by which its layer divides"
            raise fail_value(_label(self.u), rule, f"the value {factor}")
        return array / factor


def sources_of(state_dict: Mapping[str, Any]) -> dict[str, Source]:
    """Return the arrays of a file by their names, that of a weight under spectral normalisation being its plain one."""
    sources, taken = {}, set()
    for name in state_dict:
        source = Source(name)
        for weight, u, other in _SPECTRAL:
            layer = name.removesuffix(weight)
            keys = {name, layer + u, layer + other}
            if layer != name and keys <= state_dict.keys():
                source = Source(name, layer + u, layer + other if other.endswith("_v") else None)
                name = f"{layer}.weight"  # noqa: PLW2901 - the plain name
                taken |= keys
        sources[name] = source
    return {name: source for name, source in sources.items() if source.u or source.key not in taken}


def _label(key: str) -> str:
    return f"state_dict[{key!r}]"
