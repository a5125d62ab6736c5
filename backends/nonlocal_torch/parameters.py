"""The parameters of a block under their canonical names: as the forward pass reads them, and as they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn

from nonlocal_core.errors import fail_value
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.parameters import param_shapes
from nonlocal_torch.layers import Scale, is_bare, map_of, norm_dtype

__all__ = ["in_evaluation", "own_params", "read_params", "renew", "renew_state", "write_params"]

_STATE_NAMES = {"mean": "running_mean", "variance": "running_var"}

_PLAIN_NORM = {"weight": 1.0, "bias": 0.0}
"""The values with which a norm computes what one without these parameters does."""


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Keep every module in evaluation, and without gradients."""
    # `model.eval()` and `model.train()` may do more than set the flag: networks define their own.
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def read_params(block: nn.Module, spec: NonLocalSpec) -> dict[str, Tensor]:
    """Return what the forward pass of a block reads in evaluation, whole where it is spread over processes.

    Raises:
        ValueError: if a layer has no such parameters; the error names it.
    """
    shapes, found = param_shapes(spec), dict[str, Tensor]()
    with in_evaluation(block):
        for layer in spec.layers:
            weight, bias = _read_layer(block.get_submodule(layer), shapes[f"{layer}.weight"][-1])
            if bias is not None and not spec.bias[layer] and bias.any():
                raise fail_value(layer, "have no bias to be read, as `spec` says", "one that is not 0")
            found |= {f"{layer}.weight": weight, f"{layer}.bias": weight[:, 0] * 0 if bias is None else bias}
        for name in shapes:
            layer, _, kind = name.partition(".")
            if layer == "norm":
                found[name] = _read_norm(block.get_submodule("norm"), kind, spec, like=found["out.weight"][:, 0])
        if spec.norm is not None and _is_changed(norm := block.get_submodule("norm"), found["norm.weight"]):
            raise fail_value("norm", "compute what its parameters say, to be read", _kind(norm))
    return {name: _whole(found[name]).reshape(shape) for name, shape in shapes.items()}


def own_params(block: nn.Module, spec: NonLocalSpec) -> dict[str, Tensor]:
    """Return the parameters and statistics that can be written, which are all but those that a norm lacks.

    Raises:
        ValueError: if a layer takes its parameters from elsewhere; the error names it.
    """
    found = {}
    for name in param_shapes(spec):
        layer, _, kind = name.partition(".")
        module = block.get_submodule(layer)
        tensors = dict(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
        tensor = tensors.get(_STATE_NAMES.get(kind, kind))
        if layer == "norm" and kind in _PLAIN_NORM and getattr(module, kind, None) is None:
            continue
        if tensor is None or not (layer == "norm" or _is_linear(module)):
            rule = f"be a layer with a {kind} of its own, which nothing changes, to be written to"
            raise fail_value(layer, rule, _kind(module))
        found[name] = tensor
    return found


@torch.no_grad()
def write_params(block: nn.Module, spec: NonLocalSpec, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Take over the values of all parameters, which fit.

    Raises:
        ValueError: if a layer takes its parameters from elsewhere, or a norm without some is to have others.
    """
    own = own_params(block, spec)
    for name in params.keys() - own.keys():
        plain = _PLAIN_NORM[name.partition(".")[2]]
        if np.any(params[name] != plain):
            label, rule = f"params[{name!r}]", f"be {plain:g} throughout, since the norm here has none of its own"
            raise fail_value(label, rule, "other values")
    for name, tensor in own.items():
        value = torch.from_numpy(params[name]).reshape(tensor.shape)
        if hasattr(tensor, "full_tensor"):  # each process takes its share
            from torch.distributed.tensor import DTensor, distribute_tensor

            spread = cast("DTensor", tensor)
            value = distribute_tensor(value.to(spread.device), spread.device_mesh, spread.placements)
        tensor.copy_(value)


def renew(block: nn.Module) -> None:
    """Give a block that 0.1.0 pickled the layers that it has now, with the same parameters."""
    for name in ("concat", "norm"):
        old = dict(block.named_children()).get(name)
        if isinstance(old, nn.ParameterDict):
            size = len(old["weight"])
            new = Scale(size, "meta") if name == "norm" else nn.Linear(size, 1, "bias" in old, device="meta")
            for kind, tensor in old.items():
                value = tensor.detach().reshape(getattr(new, kind).shape)
                setattr(new, kind, nn.Parameter(value, tensor.requires_grad))
            setattr(block, name, new.train(old.training))


def renew_state(state: dict[str, Any], prefix: str) -> None:
    """Give what 0.1.0 saved of the layer `concat` the shapes that it has now."""
    for kind, rank in (("weight", 2), ("bias", 1)):
        name = f"{prefix}concat.{kind}"
        if name in state and state[name].dim() < rank:
            state[name] = state[name][None]


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer computes with its weight and bias, and no hook makes them or changes the result."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    if vars(layer).keys() & {"forward", "weight", "bias"}:
        return False
    weight = layer.weight
    if is_bare(layer, nn.Linear) or hasattr(weight, "__tensor_flatten__") or weight.is_meta:
        return True
    ones = torch.ones(1, layer.in_features, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return torch.allclose(layer(ones), layer.forward(ones), rtol=0, atol=0, equal_nan=True)


def _read_layer(layer: nn.Module, entering: int) -> tuple[Tensor, Tensor | None]:
    if _is_linear(layer):
        weight = layer.weight
        if hasattr(weight, "full_tensor") or not hasattr(weight, "__tensor_flatten__"):
            return weight, layer.bias
    return map_of(layer, entering)


def _read_norm(norm: nn.Module, kind: str, spec: NonLocalSpec, like: Tensor) -> Tensor:
    if vars(norm).keys() & _PLAIN_NORM.keys():  # what a hook made in the last call
        norm(like[None, :, None].to(norm_dtype(norm, like.dtype)))
    tensor = getattr(norm, _STATE_NAMES.get(kind, kind), None)
    if spec.norm == "affine" and not isinstance(norm, Scale):
        tensor = None
    elif tensor is None and kind in _PLAIN_NORM:
        return torch.full_like(like, _PLAIN_NORM[kind])
    if tensor is None:
        rule = f"have a {kind} to be read, as one of kind {spec.norm!r} has"
        raise fail_value("norm", rule, _kind(norm))
    return tensor


def _is_changed(norm: nn.Module, weight: Tensor) -> bool:
    """Return whether a norm of a known kind computes in evaluation something else than that kind does."""
    kinds: tuple[Any, ...] = (Scale, nn.SyncBatchNorm, nn.BatchNorm1d)
    kind = next((kind for kind in kinds if isinstance(norm, kind)), None)
    if kind is None or is_bare(norm, kind) or hasattr(weight, "__tensor_flatten__") or weight.is_meta:
        return False
    ones = torch.ones_like(weight, dtype=norm_dtype(norm, weight.dtype))[None, :, None]
    # Another class may round otherwise, by no more than any dtype does.
    return not torch.allclose(norm(ones), kind.forward(norm, ones), rtol=2.0**-6, atol=2.0**-6, equal_nan=True)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece, which takes all processes where it is spread over them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
