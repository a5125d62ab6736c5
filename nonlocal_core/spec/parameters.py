"""The canonical parameters of a block: their names, their shapes, and their start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_array, check_floating, check_sizes, dtype_name
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.spec.block import NonLocalSpec, check_spec

__all__ = ["STATISTICS", "check_params", "init_params", "param_shapes"]

STATISTICS = ("norm.mean", "norm.variance")
"""The parameters that are running statistics: no gradient reaches them."""

WEIGHT_STD = 0.01
"""The standard deviation of new weights."""


def param_shapes(spec: NonLocalSpec) -> dict[str, tuple[int, ...]]:
    """Return the canonical names and shapes of the parameters of `spec`; they do not depend on the rank.

    Weights are `(out, in)`, as in the formulas; `concat.weight` holds the half for theta, then that for phi.

    Args:
        spec: the block.

    Returns:
        A dict from name to shape, in the order of the computation.

    Raises:
        TypeError: if `spec` is none.

    Example:
        >>> param_shapes(NonLocalSpec(channels=4, pairwise="gaussian", norm="affine"))
        ... # doctest: +NORMALIZE_WHITESPACE
        {'g.weight': (2, 4), 'g.bias': (2,), 'out.weight': (4, 2), 'out.bias': (4,),
         'norm.weight': (4,), 'norm.bias': (4,)}
    """
    check_spec(spec)
    outer, inner = spec.channels, spec.inner_channels
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in spec.layers:
        weight = {"out": (outer, inner), "concat": (2 * inner,)}.get(layer, (inner, outer))
        shapes[f"{layer}.weight"] = weight
        if spec.bias[layer]:
            shapes[f"{layer}.bias"] = weight[:-1]
    if spec.norm is not None:
        names = ("weight", "bias", "mean", "variance") if spec.norm == "batch" else ("weight", "bias")
        shapes |= {f"norm.{name}": (outer,) for name in names}
    return shapes


def init_params(spec: NonLocalSpec, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Return new parameters: weights normal with standard deviation 0.01, biases and means 0, variances 1.

    With `zero_init` the last factor of the block is 0 (`norm.weight` if there is a norm, else `out.weight`),
    so that a residual block is exactly the identity (section 4.1 of the paper); otherwise `norm.weight` is 1.

    Args:
        spec: the block.
        rng: the source of the random weights.

    Returns:
        A dict of float64 arrays, named and shaped as `param_shapes` says.

    Raises:
        TypeError: if `spec` is none, or `rng` is not a NumPy generator.

    Example:
        >>> params = init_params(NonLocalSpec(channels=4), np.random.default_rng(0))
        >>> bool(params["out.weight"].any())
        False
    """
    if not isinstance(rng, np.random.Generator):
        raise fail_type("rng", "be a numpy.random.Generator", rng)
    return {name: _initial(name, shape, spec, rng) for name, shape in param_shapes(spec).items()}


def initial_moments(name: str, spec: NonLocalSpec) -> tuple[float, float]:
    """Return the mean and the standard deviation with which a parameter starts."""
    if name == "norm.weight":
        return (0.0 if spec.zero_init else 1.0, 0.0)
    if name == "norm.variance":
        return (1.0, 0.0)
    zero = name == "out.weight" and spec.zero_init and spec.norm is None
    return (0.0, WEIGHT_STD if name.endswith(".weight") and not zero else 0.0)


def _initial(name: str, shape: tuple[int, ...], spec: NonLocalSpec, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    mean, deviation = initial_moments(name, spec)
    return rng.normal(mean, deviation, shape) if deviation else np.full(shape, mean)


def check_params(params: Mapping[str, Any], spec: NonLocalSpec) -> None:
    """Check that `params` holds exactly the parameters of `spec`, in their shapes.

    Raises:
        TypeError: if `params` is not a mapping, or a parameter is no floating-point array.
        ValueError: if a parameter is missing or unknown, or has a wrong shape.
    """
    if not isinstance(params, Mapping):
        raise fail_type("params", "be a mapping from names to arrays", params)
    shapes = param_shapes(spec)
    missing, unknown = (sorted(a.keys() - b.keys(), key=str) for a, b in ((shapes, params), (params, shapes)))
    if missing or unknown:
        raise fail_value("params", f"hold exactly {list(shapes)}", f"missing {missing}, unknown {unknown}")
    for name, shape in shapes.items():
        argument, array = f"params[{name!r}]", params[name]
        check_array(argument, array)
        check_floating(argument, dtype_name(array))
        check_sizes(argument, array.shape, shape)
