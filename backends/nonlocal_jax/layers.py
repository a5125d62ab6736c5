"""The projections of a block: one product where they are plain, and called as every layer where they are not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from nonlocal_core.arguments import check_array, check_sizes
from nonlocal_jax.arrays import product, wide_dtype

__all__ = ["Affine", "Layers", "affines_of", "layer_of", "project", "weights_of"]

_PLAIN = {
    name: parameter.default
    for name, parameter in inspect.signature(nnx.Linear).parameters.items()
    if name in {"precision", "dot_general", "promote_dtype", "preferred_element_type"}
}


class Affine(NamedTuple):
    """W a + b, with the axis of the weight that meets a."""

    weight: Array
    bias: Array | None
    axis: int


Layers = Mapping[str, Affine | Callable[[Array], Array]]


def affines_of(params: Mapping[str, Any]) -> Layers:
    """Return the projections among canonical parameters, whose weights are (out, in)."""
    names = [name for name in ("theta", "phi", "g", "out") if f"{name}.weight" in params]
    return {name: Affine(params[f"{name}.weight"], params.get(f"{name}.bias"), 1) for name in names}


def layer_of(name: str, module: Any, sizes: tuple[int, int], dtype: Any) -> Affine | Callable[[Array], Array]:
    """Return a layer as its weights if it is plainly what a block makes for these sizes, else what calls it."""
    if type(module) is nnx.Linear and module.dtype == dtype and module.kernel.shape == sizes:
        bias = None if module.bias is None else module.bias[...]
        if all(getattr(module, option) == plain for option, plain in _PLAIN.items()):
            return Affine(module.kernel[...], bias, 0)
    return partial(_called, name, module, sizes[1])


def _called(name: str, module: Callable[[Array], Any], width: int, a: Array) -> Array:
    """Return what a layer makes of `a`, computed as the layer does."""
    result = module(a)
    check_array(name, result)
    check_sizes(name, result.shape, (*a.shape[:-1], width))
    return result.astype(a.dtype)


def project(a: Array, layers: Layers, *names: str) -> list[Array]:
    """Return what each layer makes of `a`, in its dtype: plain ones together, and `a` where there is none."""
    results, plain = dict.fromkeys(names, a), {}
    for name in layers.keys() & results.keys():
        layer = layers[name]
        if isinstance(layer, Affine):
            plain[name] = layer
        else:
            results[name] = layer(a)
    if plain:
        axis = next(iter(plain.values())).axis
        weights = jnp.concatenate([jnp.asarray(layer.weight, a.dtype) for layer in plain.values()], axis=1 - axis)
        together = product("...c,dc->...d" if axis else "...c,cd->...d", a, weights, a.dtype)
        for (name, layer), part in zip(plain.items(), jnp.split(together, len(plain), axis=-1), strict=True):
            results[name] = part
            if layer.bias is not None:
                bias = jnp.asarray(layer.bias, a.dtype)
                results[name] = part + bias.reshape((1,) * (a.ndim - 1) + bias.shape)
    return list(results.values())


def weights_of(name: str, module: Any) -> tuple[Array, Array | None]:
    """Return the kernel (in, out) and the bias of a layer, what LoRA adds included."""
    if type(module) is nnx.Linear:
        return module.kernel[...], None if module.bias is None else module.bias[...]
    if type(module) is nnx.LoRALinear:
        parts = (module.kernel[...], weights_of(name, module.lora)[0])
        return _total(*parts), None if module.bias is None else module.bias[...]
    if type(module) is not nnx.LoRA:
        message = f"`{name}` must be a flax.nnx.Linear, with or without LoRA, to be read. Got {type(module).__name__}."
        raise TypeError(message)
    a, b = module.lora_a[...], module.lora_b[...]
    added = product("ir,ro->io", a, b, wide_dtype(a, b))
    if module.base_module is None:
        return added, None
    kernel, bias = weights_of(name, module.base_module)
    return _total(kernel, added), bias


def _total(a: Array, b: Array) -> Array:
    dtype = wide_dtype(a, b)
    return a.astype(dtype) + b.astype(dtype)
