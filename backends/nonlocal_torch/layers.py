"""The layers around the operation as products that cost no more than they must."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from nonlocal_core.spec.form import Form
from nonlocal_torch.context import full_precision, has_autocast, is_transformed

__all__ = [
    "Affine",
    "Layer",
    "Layers",
    "Scale",
    "bare",
    "fixed_norm",
    "fold_concat",
    "fold_scale",
    "is_bare",
    "map_of",
    "memory_format_of",
    "norm_dtype",
    "project",
    "project_back",
]

M = TypeVar("M", bound=nn.Module)

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Affine(NamedTuple):
    """One map W a + b: that of a layer which need not be called, or one that is made of several.

    Args:
        weight: `(out, in)`.
        bias: `(out,)`, or None.
    """

    weight: Tensor
    bias: Tensor | None


Layer = Affine | nn.Module
"""What gives an operand: a map whose product may be made together with others, or a layer that is called."""


class Layers(NamedTuple):
    """The layers that give the operands of the operation; where there is none, the operand is the input itself."""

    theta: Layer | None
    phi: Layer | None
    g: Layer | None


class Scale(nn.GroupNorm):
    """The factor and the shift of each channel of `(B, C, N)`: what is left of a frozen norm, and a norm to tools."""

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Create the parameters, one of each for every channel."""
        super().__init__(1, channels, device=device, dtype=dtype)

    def forward(self, a: Tensor) -> Tensor:
        """Return `weight * a + bias`."""
        return self.weight[:, None] * a + self.bias[:, None]

    def extra_repr(self) -> str:
        """Show the channels."""
        return f"{self.num_channels}"


def is_bare(layer: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Return whether a layer is PyTorch's own with nothing on it: it computes what its parameters say and no more."""
    state = vars(layer)
    own = state["_parameters"]
    return (
        # An export has a class of its own for every module.
        isinstance(layer, kind)
        and type(layer).forward is kind.forward
        and "forward" not in state
        and "weight" in own
        and "bias" in own
        and not hasattr(own["weight"], "__tensor_flatten__")  # as tensors of other kinds have: quantised, distributed
        and not (state["_forward_hooks"] or state["_forward_pre_hooks"])
        and not (state["_backward_hooks"] or state["_backward_pre_hooks"])
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def bare(layer: nn.Module) -> Layer:
    """Return the map of a layer that need not be called, and any other as it is."""
    return Affine(layer.weight, layer.bias) if is_bare(layer, nn.Linear) else layer


def map_of(layer: nn.Module, entering: int) -> Affine:
    """Return the affine map that a layer computes; one that must be called is called once, on every unit vector."""
    found = bare(layer)
    if isinstance(found, Affine):
        return found
    tensors = (a for a in chain(layer.parameters(), layer.buffers()) if a.is_floating_point())
    like = next(tensors, torch.empty(0))
    # Long vectors: what the bias, which is taken off again, takes from the digits of the weight is divided by this.
    length = 1024.0
    vectors = length * torch.eye(entering + 1, entering, dtype=like.dtype, device=like.device)  # the last is 0
    with full_precision(like.device.type):
        rows = layer(vectors)
    return Affine((rows[:-1] - rows[-1]).transpose(0, 1) / length, rows[-1])


def project(a: Tensor, layers: Sequence[Layer | None]) -> list[Tensor]:
    """Return what each layer gives for `a` `(.., C)`; for None, `a` itself.

    Those that need not be called are one product, in the dtype of `a`.
    """
    maps = [layer for layer in layers if isinstance(layer, Affine)]
    parts = iter(_products(a, maps) if maps else ())
    return [a if layer is None else next(parts) if isinstance(layer, Affine) else layer(a) for layer in layers]


def _products(a: Tensor, maps: Sequence[Affine]) -> Sequence[Tensor]:
    weights = [one.weight.to(a.dtype) for one in maps]
    biases = [None if one.bias is None else one.bias.to(a.dtype) for one in maps]
    sizes = [weight.shape[0] for weight in weights]
    if not torch.compiler.is_compiling() and a.shape[0] * a.shape[1] < sum(sizes):
        # To bring the weights together would cost more than to read `a` once for each of them.
        return [functional.linear(a, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    bias = None
    if any(bias is not None for bias in biases):
        pairs = zip(weights, biases, strict=True)
        bias = torch.cat([weight.new_zeros(weight.shape[0]) if b is None else b for weight, b in pairs])
    return torch.split_with_sizes(functional.linear(a, torch.cat(weights), bias), sizes, dim=-1)


def project_back(y: Tensor, layer: Layer, x: Tensor) -> Tensor:
    """Return W y + b in the dtype of `y` and the shape of `x` `(B, C, S1..Sk)`, laid out to be added without a copy."""
    if not isinstance(layer, Affine):
        return layer(y).transpose(1, 2).reshape(x.shape)
    weight, bias = layer.weight.to(y.dtype), None if layer.bias is None else layer.bias.to(y.dtype)
    # A compiler lays out what it makes, and a question about a size would bind it.
    if not torch.compiler.is_compiling():
        # The other product has a gradient of the weight for every sample first: more than x where C' is above N.
        costly = torch.is_grad_enabled() and weight.shape[1] > y.shape[1]
        if costly or (not x.is_contiguous() and memory_format_of(x) != torch.contiguous_format):
            return functional.linear(y, weight, bias).transpose(1, 2).reshape(x.shape)
    weight = weight.expand(y.shape[0], *weight.shape)
    r = (
        torch.bmm(weight, y.transpose(1, 2))
        if bias is None
        else torch.baddbmm(bias[:, None], weight, y.transpose(1, 2))
    )
    return r.reshape(x.shape)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory layout of `x`, for a result that should have the same."""
    last = None if is_transformed() else _CHANNELS_LAST.get(x.dim())  # vmap has no answer
    if last and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def fold_concat(x: Tensor, theta: Layer, phi: Layer, form: Form, *, pooled: bool) -> tuple[Layer, Layer, Form]:
    """Fold the weight of the concatenation form into theta, and into phi unless it is pooled: one channel is left.

    The scores see theta and phi as w_theta . theta and w_phi . phi alone, and w . (W x + b) = (w W) x + w . b. Where
    theta or phi is a layer that is called, it keeps its channels.
    """
    is_cast = has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)
    if is_cast or x.dtype not in {torch.float32, torch.float64}:
        return theta, phi, form  # sums of C' products would leave the range of half precision
    weight = form.concat_weight.to(x.dtype)
    for_theta, for_phi = weight.split(weight.shape[1] // 2, dim=1)
    one = torch.ones_like(weight[:, :1])
    if isinstance(theta, Affine):
        theta, for_theta = _weighted(for_theta, theta), one
    if isinstance(phi, Affine) and not pooled:
        phi, for_phi = _weighted(for_phi, phi), one
    return theta, phi, dataclasses.replace(form, concat_weight=torch.cat([for_theta, for_phi], dim=1))


def _weighted(row: Tensor, layer: Affine) -> Affine:
    """Return the weighted sum of the outputs of a layer as a layer of one output."""
    return Affine(row @ layer.weight.to(row.dtype), None if layer.bias is None else row @ layer.bias.to(row.dtype))


def fold_scale(layer: Affine, factor: Tensor, shift: Tensor) -> Affine:
    """Return the layer and the map `factor * a + shift` of each of its channels as one layer."""
    weight = layer.weight.to(factor.dtype)
    bias = shift if layer.bias is None else factor * layer.bias.to(factor.dtype) + shift
    return Affine(factor[:, None] * weight, bias)


def fixed_norm(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return factor and shift of a norm that takes no statistics of its input and need not be called, else None."""
    if is_bare(norm, Scale):
        return norm.weight, norm.bias
    if not is_bare(norm, nn.BatchNorm1d) or norm.training or norm.running_mean is None or norm.running_var is None:
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
