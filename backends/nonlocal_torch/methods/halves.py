"""The softmax forms on operands in half precision: scores and sums in float32, weights in the dtype of the operands.

Autograd does not record what these functions do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nonlocal_torch.methods.pairwise import softmax
from nonlocal_torch.methods.products import narrowed, product

__all__ = ["gradients", "sums", "weights_of"]

UNIT = {torch.bfloat16: 1.0, torch.float16: 2.0**15}
"""What stands for a weight of 1: in float16 the weights of many keys would lose their digits near 0."""


def weights_of(theta: Tensor, phi: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Return the weights (B, N, M), times their unit."""
    scores = product(theta, phi.mT)
    weights = softmax(scores if scale == 1 else scores.mul_(scale), None if valid is None else valid[:, None, :])
    unit = UNIT[theta.dtype]
    return (weights if unit == 1 else weights.mul_(unit)).to(theta.dtype)


def sums(weights: Tensor, g: Tensor) -> Tensor:
    """Return y (B, N, D)."""
    return (product(weights, g) / _total(weights)).to(g.dtype)


def gradients(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    valid: Tensor | None,
    scale: float,
    dy: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of theta, phi and g in float32; weights that were not kept are made anew."""
    weights = weights_of(theta, phi, valid, scale) if weights is None else weights
    dweights = product(dy, g.mT)
    mean = (weights * dweights).sum(dim=-1, keepdim=True) / _total(weights)
    dscores, peak = narrowed(dweights.sub_(mean).mul_(weights), theta.dtype)
    unit = UNIT[theta.dtype]
    factor = scale / unit if peak is None else scale / unit * peak
    dtheta, dphi = product(dscores, phi), product(dscores.mT, theta)
    return _times(dtheta, factor), _times(dphi, factor), _times(product(weights.mT, dy), 1 / unit)


def _times(a: Tensor, factor: float | Tensor) -> Tensor:
    return a if isinstance(factor, float) and factor == 1 else factor * a


def _total(weights: Tensor) -> Tensor:
    """Return the sum of each row of rounded weights, about 1 unit; where all are 0, another number than 0."""
    return weights.sum(dim=-1, keepdim=True, dtype=torch.float32).clamp(min=0.5)
