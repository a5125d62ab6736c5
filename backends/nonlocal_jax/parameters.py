"""The layers of a module and their parameters: made, read and written under canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nonlocal_core.errors import fail_value
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.parameters import STATISTICS, initial_moments, param_shapes
from nonlocal_jax.layers import Layers, layer_of, weights_of

__all__ = ["canonical_of", "in_place_of", "names_of", "new_layer", "usable", "variables_of"]

_DICTS = ("concat", "norm")
"""The layers that are no projections: their variables, in a dict."""


def names_of(spec: NonLocalSpec) -> list[str]:
    """Return the names of the layers that have parameters."""
    return list(dict.fromkeys(name.partition(".")[0] for name in param_shapes(spec)))


def new_layer(name: str, spec: NonLocalSpec, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> nnx.Module:
    """Return a layer of a new block: a linear one, or the variables of what has no layer of Flax."""
    if name in _DICTS:
        names = [full for full in param_shapes(spec) if full.startswith(f"{name}.")]
        return nnx.Dict({full.partition(".")[2]: _variable(full, spec, rngs, param_dtype) for full in names})
    _, deviation = initial_moments(f"{name}.weight", spec)
    start = nnx.initializers.normal(deviation) if deviation else nnx.initializers.zeros
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": start}
    return nnx.Linear(*_sizes(name, spec), use_bias=spec.bias[name], **options, rngs=rngs)


def _variable(name: str, spec: NonLocalSpec, rngs: nnx.Rngs, param_dtype: Any) -> nnx.Variable[Array]:
    shape, (mean, deviation) = param_shapes(spec)[name], initial_moments(name, spec)
    if name in STATISTICS:
        return nnx.BatchStat(jnp.full(shape, mean, np.promote_types(jnp.dtype(param_dtype), np.float32)))
    if deviation:
        return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, param_dtype))
    return nnx.Param(jnp.full(shape, mean, param_dtype))


def _sizes(name: str, spec: NonLocalSpec) -> tuple[int, int]:
    """Return the numbers of channels that enter and leave a layer."""
    inner = spec.channels if name == "norm" else spec.inner_channels
    return (inner, spec.channels) if name == "out" else (spec.channels, inner)


def usable(modules: Mapping[str, Any], spec: NonLocalSpec, dtype: Any) -> tuple[Layers, dict[str, Array], Form]:
    """Return layers as the block computes with them, the parameters of those that are dicts, and the form."""
    layers: dict[str, Any] = {}
    params: dict[str, Array] = {}
    for name, module in modules.items():
        if name in _DICTS and type(module) is nnx.Dict:
            params |= {f"{name}.{kind}": variable[...] for kind, variable in module.items()}
        elif name == "concat":
            raise _not_its_own(name, module)
        else:
            layers[name] = layer_of(name, module, _sizes(name, spec), dtype)
    return layers, params, form_of(spec, params)


def canonical_of(modules: Mapping[str, Any], spec: NonLocalSpec) -> dict[str, Array]:
    """Return what the layers compute with, under the canonical names."""
    found: dict[str, Array] = {}
    for name, module in modules.items():
        if name in _DICTS:
            found |= {f"{name}.{kind}": variable[...] for kind, variable in _own(name, module).items()}
            continue
        kernel, bias = weights_of(name, module)
        if (bias is not None) != spec.bias[name]:
            rule = f"have {'a' if bias is None else 'no'} bias, as the spec says"
            raise fail_value(name, rule, f"a {type(module).__name__} put in its place")
        found |= {f"{name}.weight": kernel.T} | ({} if bias is None else {f"{name}.bias": bias})
    return found


def variables_of(modules: Mapping[str, Any], spec: NonLocalSpec) -> dict[str, nnx.Variable[Array]]:
    """Return the variables under the canonical names, to be written to; a weight is the transpose of its kernel."""
    variables = {}
    for name in param_shapes(spec):
        layer, _, kind = name.partition(".")
        owner = _own(layer, modules[layer])
        variables[name] = owner[kind] if layer in _DICTS else getattr(owner, "kernel" if kind == "weight" else kind)
    return variables


def _own(name: str, module: Any) -> Any:
    """Return a layer of the kind that a block makes."""
    if type(module) is not (nnx.Dict if name in _DICTS else nnx.Linear):
        raise _not_its_own(name, module)
    return module


def _not_its_own(name: str, module: Any) -> TypeError:
    kind = "the dict that the block has made" if name in _DICTS else "a flax.nnx.Linear to be written to"
    return TypeError(f"`{name}` must be {kind}. Got {type(module).__name__}.")


def in_place_of(old: Array, new: Any) -> Array:
    """Return a new value in the dtype and on the devices of the old one."""
    # Bound to a device only where the old array was: else it could not meet arrays on several.
    return jax.device_put(np.asarray(new).astype(old.dtype), old.sharding if old.committed else None)
