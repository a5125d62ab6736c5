"""The layers around the operation as products that cost no more than they must."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_core.spec.form import Form

__all__ = ["Affine", "followed", "layout", "project", "project_back", "shortened"]

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Affine(NamedTuple):
    """One map W a + b.

    Args:
        weight: `(out, in)`.
        bias: `(out,)`, or None.
    """

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Affine:
        """Return the map in a dtype."""
        return Affine(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def project(a: Tensor, layers: Mapping[str, Affine], names: Sequence[str]) -> tuple[Tensor, ...]:
    """Return what each of the named layers gives for `a` `(.., C)`, by one product; where there is none, `a` itself."""
    chosen = [layers[name] for name in names if name in layers]
    weights = [layer.weight for layer in chosen]
    sizes = [weight.shape[0] for weight in weights]
    if _is_apart(a, sum(sizes)):
        return tuple(functional.linear(a, *layers[name]) if name in layers else a for name in names)
    bias = None
    if any(layer.bias is not None for layer in chosen):
        bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in chosen])
    parts = iter(functional.linear(a, torch.cat(weights), bias).split(sizes, dim=-1) if chosen else ())
    return tuple(next(parts) if name in layers else a for name in names)


def _is_apart(a: Tensor, channels: int) -> bool:
    """Return whether to bring the weights together costs more than to read `a` `(B, N, C)` once for each of them."""
    return not torch.compiler.is_compiling() and a.shape[0] * a.shape[1] < channels


def shortened(
    x: Tensor, layers: Mapping[str, Affine], form: Form, *, pooled: bool
) -> tuple[Mapping[str, Affine], Form]:
    """Return the layers of the concatenation form with one channel for theta, and for phi unless it is pooled.

    The scores see theta and phi as w_theta . theta and w_phi . phi alone, and w . (W x + b) = (w W) x + w . b.
    """
    if x.dtype not in {torch.float32, torch.float64} or torch.is_autocast_enabled(x.device.type):
        return layers, form  # sums of C' products would leave the range of half precision
    weight = form.concat_weight.to(x.dtype)
    of_theta, of_phi = weight.split(weight.shape[0] // 2)
    one = torch.ones_like(weight[:1])
    short = {"theta": _row(of_theta, layers["theta"]), **({} if pooled else {"phi": _row(of_phi, layers["phi"])})}
    new = torch.cat([one, of_phi if pooled else one])
    return {**layers, **short}, dataclasses.replace(form, concat_weight=new)


def _row(weight: Tensor, layer: Affine) -> Affine:
    return Affine(weight[None] @ layer.weight, None if layer.bias is None else weight[None] @ layer.bias)


def followed(layer: Affine, factor: Tensor, shift: Tensor) -> Affine:
    """Return the layer and the map `factor * a + shift` of each of its channels as one layer."""
    bias = shift if layer.bias is None else factor * layer.bias + shift
    return Affine(factor[:, None] * layer.weight, bias)


def project_back(y: Tensor, layer: Affine, x: Tensor) -> Tensor:
    """Return W y + b in the shape of `x` `(B, C, S1..Sk)`, laid out so that it can be added without a copy."""
    weight, bias = layer
    if _is_rows_first(y, weight, x):
        return functional.linear(y, weight, bias).mT.reshape(x.shape)
    weight = weight.expand(y.shape[0], *weight.shape)
    r = torch.bmm(weight, y.mT) if bias is None else torch.baddbmm(bias[:, None], weight, y.mT)
    return r.reshape(x.shape)


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory layout of `x`, for a result that should have the same."""
    last = _LAYOUTS.get(x.dim())
    if last and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def _is_rows_first(y: Tensor, weight: Tensor, x: Tensor) -> bool:
    """Return whether the product is made as (B, N, C), which is the layout of channels-last inputs."""
    if torch.compiler.is_compiling():
        return False  # the compiler lays out what it makes, and a question about a size would bind it
    # The other product has a gradient of the weight for every sample first: more than x where C' is above N.
    costly = torch.is_grad_enabled() and weight.shape[1] > y.shape[1]
    return costly or layout(x) != torch.contiguous_format
