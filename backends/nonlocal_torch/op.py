"""The non-local operation on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_core.checks import check_op
from nonlocal_core.form import Form

__all__ = ["nonlocal_op"]


def nonlocal_op(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    pairwise: str | Callable[[Tensor, Tensor], Tensor] = "embedded_gaussian",
    scale: float | None = None,
    concat_weight: Tensor | None = None,
    concat_bias: Tensor | None = None,
    normalize: str | None = None,
    key_mask: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Compute the non-local operation, y_i = sum_j w_ij g_j (equation 1 of the paper).

    Scores, weights and sums are at least float32, whatever the dtype of the operands. With method "auto" and
    no gradient to record, the softmax forms use PyTorch's fused attention.

    Args:
        theta: queries `(B, N, C')`.
        phi: keys `(B, M, C')`.
        g: values `(B, M, D)`.
        pairwise: "gaussian", "embedded_gaussian", "dot_product", "concatenation", or a function
            `f(theta, phi) -> scores (B, N, M)` of each pair alone.
        scale: a finite, non-zero float that multiplies the scores; None is 1.
        concat_weight: w_f `(2C',)`, the half for theta first; for the concatenation form.
        concat_bias: b_f `()`; for the concatenation form, optional.
        normalize: "softmax" or "count" for a function, None for the named forms.
        key_mask: `(B, M)`, True where a key takes part. A query without any key gives 0.
        method: "auto" or "pairwise".

    Returns:
        y `(B, N, D)` in the dtype of `theta`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if shapes or options do not fit each other.

    Example:
        >>> import torch
        >>> theta, phi, g = torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.arange(3.0).reshape(1, 3, 1)
        >>> nonlocal_op(theta, phi, g)[0, :, 0]
        tensor([1., 1.])
    """
    form = check_op(theta, phi, g, pairwise, scale, concat_weight, concat_bias, normalize, key_mask, method)
    return aggregate(theta, phi, g, form, key_mask, method)


def aggregate(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None, method: str) -> Tensor:
    """Compute the operation on checked arguments."""
    if key_mask is not None:
        phi, g = (a.masked_fill(~key_mask[..., None], 0) for a in (phi, g))
    # The fused kernel of the CPU has no second derivative, and none has forward mode.
    recorded = torch.is_grad_enabled() and any(a.requires_grad for a in (theta, phi, g))
    if method == "auto" and form.softmax and form.named and not recorded:
        return fused_attention(theta, phi, g, form.scale, key_mask)
    valid = None if key_mask is None else key_mask[:, None, :]
    weights = pairwise_weights(theta, phi, form, valid)
    with _full_precision(theta.device.type):
        return (weights @ g.to(weights.dtype)).to(theta.dtype)


def fused_attention(theta: Tensor, phi: Tensor, g: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    """Compute the softmax forms without the matrix of weights."""
    theta, phi, g = (a.to(theta.dtype) for a in (theta, phi, g))
    # The kernels are fused for equal widths only: zero columns change neither scores nor sums.
    width = max(theta.shape[-1], g.shape[-1])
    query, key, value = (functional.pad(a, (0, width - a.shape[-1])).unsqueeze(1) for a in (theta, phi, g))
    # The kernel takes its maximum before the scale, so a sign goes into the queries, exactly.
    with _full_precision(theta.device.type):
        y = functional.scaled_dot_product_attention(
            query if scale > 0 else -query,
            key,
            value,
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            scale=abs(scale),
        )
    y = y.squeeze(1)[..., : g.shape[-1]]
    if key_mask is None:
        return y
    return y.masked_fill(~key_mask.any(dim=1)[:, None, None], 0)


def pairwise_weights(theta: Tensor, phi: Tensor, form: Form, valid: Tensor | None) -> Tensor:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    with _full_precision(theta.device.type):
        theta, phi = theta.to(dtype), phi.to(dtype)
        if not isinstance(form.pairwise, str):
            scores = form.scale * form.pairwise(theta, phi)
        elif form.pairwise == "concatenation":
            half = theta.shape[-1]
            weight = form.concat_weight.to(dtype)
            a, b = functional.linear(theta, weight[None, :half]), functional.linear(phi, weight[None, half:])
            a = a if form.concat_bias is None else a + form.concat_bias.to(dtype)
            scores = form.scale * functional.relu(a + b.mT)
        else:
            scores = (form.scale * theta) @ phi.mT
        if form.softmax:
            return _softmax(scores, valid)
        if valid is None:
            return scores / phi.shape[1]
        count = valid.sum(dim=-1, keepdim=True).clamp(min=1)
        return scores.masked_fill(~valid, 0) / count


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast, for devices that have one."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores.softmax(dim=-1)
    # A row without any key would be NaN: it is computed with every key, then set to 0.
    empty = ~valid.any(dim=-1, keepdim=True)
    return scores.masked_fill(~(valid | empty), -torch.inf).softmax(dim=-1).masked_fill(~valid, 0)
