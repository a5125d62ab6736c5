"""One pairwise form with its numbers: what turns theta and phi into weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nonlocal_core.spec import NonLocalSpec

__all__ = ["Form", "form_of"]


@dataclasses.dataclass(frozen=True)
class Form:
    """One pairwise form with its numbers; the arrays are of any library.

    Args:
        pairwise: the name of the form, or a function.
        softmax: whether weights are a softmax over the keys (False: scores divided by their number).
        scale: the factor on the scores.
        concat_weight: w_f `(2C',)`, for the concatenation form.
        concat_bias: b_f `()`, or None.
    """

    pairwise: str | Callable[[Any, Any], Any]
    softmax: bool
    scale: float
    concat_weight: Any = None
    concat_bias: Any = None

    @property
    def named(self) -> bool:
        """Whether each query's scores depend on that query alone, so that queries can be cut into blocks."""
        return isinstance(self.pairwise, str)


def form_of(spec: NonLocalSpec, params: Mapping[str, Any]) -> Form:
    """Return the form of a block with these parameters, of which it takes those of the layer `concat`."""
    concat = (params.get(f"concat.{kind}") for kind in ("weight", "bias"))
    return Form(spec.pairwise, spec.is_softmax, spec.scale_factor, *concat)
