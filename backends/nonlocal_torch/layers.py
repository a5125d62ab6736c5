"""The layers around the operation as products that cost no more than they must."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nonlocal_core.spec.form import Form

__all__ = [
    "Affine",
    "Layers",
    "fixed_norm",
    "fold_concat",
    "fold_scale",
    "memory_format_of",
    "norm_dtype",
    "project",
    "project_back",
]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Affine(NamedTuple):
    """One map W a + b that is made of the parameters of a block.

    Args:
        weight: `(out, in)`.
        bias: `(out,)`, or None.
    """

    weight: Tensor
    bias: Tensor | None


Layer = Affine | nn.Linear


class Layers(NamedTuple):
    """The layers that give the operands of the operation; where there is none, the operand is the input itself."""

    theta: Layer | None
    phi: Layer | None
    g: Layer


def project(a: Tensor, layers: Sequence[Layer | None]) -> list[Tensor]:
    """Return what each layer gives for `a` `(.., C)`, in the dtype of `a`, by one product; for None, `a` itself."""
    chosen = [layer for layer in layers if layer is not None]
    if not chosen:
        return [a] * len(layers)
    weights = [layer.weight.to(a.dtype) for layer in chosen]
    biases = [None if layer.bias is None else layer.bias.to(a.dtype) for layer in chosen]
    sizes = [weight.shape[0] for weight in weights]
    if not torch.compiler.is_compiling() and a.shape[0] * a.shape[1] < sum(sizes):
        # To bring the weights together would cost more than to read `a` once for each of them.
        parts = iter([functional.linear(a, weight, bias) for weight, bias in zip(weights, biases, strict=True)])
    else:
        bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([weight.new_zeros(weight.shape[0]) if b is None else b for weight, b in pairs])
        whole = functional.linear(a, torch.cat(weights), bias)
        parts = iter(torch.split_with_sizes(whole, sizes, dim=-1))
    return [a if layer is None else next(parts) for layer in layers]


def project_back(y: Tensor, layer: Layer, x: Tensor) -> Tensor:
    """Return W y + b in the dtype of `y` and the shape of `x` `(B, C, S1..Sk)`, laid out to be added without a copy."""
    weight, bias = layer.weight.to(y.dtype), None if layer.bias is None else layer.bias.to(y.dtype)
    # A compiler lays out what it makes, and a question about a size would bind it.
    if not torch.compiler.is_compiling():
        # The other product has a gradient of the weight for every sample first: more than x where C' is above N.
        costly = torch.is_grad_enabled() and weight.shape[1] > y.shape[1]
        if costly or (not x.is_contiguous() and memory_format_of(x) != torch.contiguous_format):
            return functional.linear(y, weight, bias).mT.reshape(x.shape)
    weight = weight.expand(y.shape[0], *weight.shape)
    r = torch.bmm(weight, y.mT) if bias is None else torch.baddbmm(bias[:, None], weight, y.mT)
    return r.reshape(x.shape)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory layout of `x`, for a result that should have the same."""
    last = _CHANNELS_LAST.get(x.dim())
    if last and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def fold_concat(x: Tensor, theta: Layer, phi: Layer, form: Form, *, pooled: bool) -> tuple[Layer, Layer, Form]:
    """Fold the weight of the concatenation form into theta, and into phi unless it is pooled: one channel is left.

    The scores see theta and phi as w_theta . theta and w_phi . phi alone, and w . (W x + b) = (w W) x + w . b.
    """
    if x.dtype not in {torch.float32, torch.float64} or torch.is_autocast_enabled(x.device.type):
        return theta, phi, form  # sums of C' products would leave the range of half precision
    weight = form.concat_weight.to(x.dtype)
    for_theta, for_phi = weight.split(weight.shape[0] // 2)
    one = torch.ones_like(weight[:1])
    folded = torch.cat([one, for_phi if pooled else one])
    phi = phi if pooled else _weighted(for_phi, phi)
    return _weighted(for_theta, theta), phi, dataclasses.replace(form, concat_weight=folded)


def _weighted(weight: Tensor, layer: Layer) -> Affine:
    """Return the weighted sum of the outputs of a layer as a layer of one output."""
    row, dtype = weight[None], weight.dtype
    return Affine(row @ layer.weight.to(dtype), None if layer.bias is None else row @ layer.bias.to(dtype))


def fold_scale(layer: Layer, factor: Tensor, shift: Tensor) -> Affine:
    """Return the layer and the map `factor * a + shift` of each of its channels as one layer."""
    weight = layer.weight.to(factor.dtype)
    bias = shift if layer.bias is None else factor * layer.bias.to(factor.dtype) + shift
    return Affine(factor[:, None] * weight, bias)


def fixed_norm(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return factor and shift of a norm that takes no statistics of its input, None for any other module.

    A module with hooks is left to them.
    """
    if isinstance(norm, nn.ParameterDict):
        return norm["weight"], norm["bias"]
    if type(norm) is not nn.BatchNorm1d or norm.training or norm.running_mean is None or norm.running_var is None:
        return None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(norm, name) for name in hooks):
        return None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:  # as it is with `affine=False`
        factor = norm.weight * factor
    shift = norm.running_mean * factor
    return factor, -shift if norm.bias is None else norm.bias - shift


def norm_dtype(norm: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype in which a norm computes: that of its weight, or else of its statistics."""
    for name in ("weight", "running_var"):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            return tensor.dtype
    return default
