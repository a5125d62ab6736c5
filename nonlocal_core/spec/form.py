"""One pairwise form with its numbers: what turns theta and phi into weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nonlocal_core.spec.block import NonLocalSpec

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
    def is_named(self) -> bool:
        """Whether it is one of the four forms; a function gets all queries at once."""
        return isinstance(self.pairwise, str)

    @property
    def halves(self) -> tuple[Any, Any]:
        """The halves of w_f for theta and for phi, each `(C',)`."""
        half = self.concat_weight.shape[0] // 2
        return self.concat_weight[:half], self.concat_weight[half:]

    def summands(self, theta: Any, phi: Any) -> tuple[Any, Any]:
        """Return w_theta . theta_i + b_f `(B, N)` and w_phi . phi_j `(B, M)`: s_ij is the ReLU of their sum."""
        for_theta, for_phi = self.halves
        a, b = theta @ for_theta, phi @ for_phi
        return (a if self.concat_bias is None else a + self.concat_bias), b


def form_of(spec: NonLocalSpec, params: Mapping[str, Any]) -> Form:
    """Return the form of a block with these parameters, of which it takes those of the layer `concat`."""
    concat = (params.get(f"concat.{kind}") for kind in ("weight", "bias"))
    return Form(spec.pairwise, spec.is_softmax, spec.scale_factor, *concat)
