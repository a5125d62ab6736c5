"""The block by the matrix, as one writes it in any framework after reading the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nonlocal_core import NonLocalSpec

__all__ = ["plain"]


def plain(x: Any, params: Mapping[str, Any], spec: NonLocalSpec, ops: Any) -> Any:
    """Return what the block adds to its input, `(B, N, C)` too.

    Args:
        x: the input, `(B, N, C)`.
        params: the arrays by the names of the specification.
        spec: embedded Gaussian, dot product or concatenation, with a batch norm and without pooling.
        ops: functions of a framework: `einsum`, `linear`, `softmax` and `relu`, and `norm` of an array and what
            batch normalisation has.
    """
    theta, phi, g, out = ([params[f"{name}.weight"], params[f"{name}.bias"]] for name in ("theta", "phi", "g", "out"))
    queries, keys, values = (ops.linear(x, *layer) for layer in (theta, phi, g))
    if spec.pairwise == "concatenation":
        width = params["concat.weight"].shape[0] // 2
        of_query = ops.einsum("bnd,d->bn", queries, params["concat.weight"][:width])
        of_key = ops.einsum("bmd,d->bm", keys, params["concat.weight"][width:])
        weights = ops.relu(of_query[:, :, None] + of_key[:, None, :]) / keys.shape[1]
    else:
        scores = ops.einsum("bnd,bmd->bnm", queries, keys)
        scores = scores if spec.scale is None else scores * keys.shape[2] ** -0.5
        weights = ops.softmax(scores) if spec.pairwise == "embedded_gaussian" else scores / keys.shape[1]
    r = ops.linear(ops.einsum("bnm,bmd->bnd", weights, values), *out)
    return ops.norm(r, *(params[f"norm.{name}"] for name in ("mean", "variance", "weight", "bias")))
