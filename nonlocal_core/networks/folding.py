"""The norm of a block in evaluation as a part of its last projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_core.errors import fail_value
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.parameters import check_params

__all__ = ["fold_norm"]


def fold_norm(
    params: Mapping[str, np.ndarray[Any, Any]], spec: NonLocalSpec
) -> tuple[dict[str, np.ndarray[Any, Any]], NonLocalSpec]:
    """Return a block without norm that computes what this one computes in evaluation.

    W_z becomes s W_z and its bias s (b_z - mean) + shift, with s = scale / sqrt(variance + epsilon).

    Args:
        params: the canonical parameters.
        spec: the block; its norm is "batch" or "affine".

    Returns:
        Parameters in the dtypes of the given ones, and the spec.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if there is no norm, or the parameters are not those of `spec`.

    Example:
        >>> from nonlocal_core import init_params, nonlocal_block
        >>> spec, rng = NonLocalSpec(channels=4, norm="batch", zero_init=False), np.random.default_rng(0)
        >>> params, x = init_params(spec, rng), rng.normal(size=(1, 6, 4))
        >>> folded, without = fold_norm(params, spec)
        >>> without.norm, np.allclose(nonlocal_block(x, folded, without), nonlocal_block(x, params, spec))
        (None, True)
    """
    check_params(params, spec)
    if spec.norm is None:
        raise fail_value("norm", "be 'batch' or 'affine' to be folded", None)
    wide = {name: np.asarray(array).astype(np.float64) for name, array in params.items()}
    factor, shift = wide["norm.weight"], wide["norm.bias"]
    if spec.norm == "batch":
        factor = factor / np.sqrt(wide["norm.variance"] + spec.norm_epsilon)
        shift = shift - factor * wide["norm.mean"]
    dtype = np.asarray(params["out.weight"]).dtype
    folded = {name: array for name, array in params.items() if not name.startswith(("norm.", "out."))}
    folded["out.weight"] = (factor[:, None] * wide["out.weight"]).astype(dtype)
    folded["out.bias"] = (factor * wide.get("out.bias", 0.0) + shift).astype(dtype)
    return folded, spec.replace(norm=None, bias={**spec.bias, "out": True})
