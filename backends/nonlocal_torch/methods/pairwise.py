"""The method "pairwise": the matrix of weights w_ij; and what other methods share with it, scores and softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_core.spec.calls import check_scores
from nonlocal_core.spec.form import Form

__all__ = ["concat_summands", "count_keys", "pairwise", "pairwise_weights", "softmax"]


def pairwise(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None) -> Tensor:
    """Return y (B, N, D) by the matrix of weights; the operands are in at least float32."""
    weights = pairwise_weights(theta, phi, form, None if key_mask is None else key_mask[:, None, :])
    return torch.bmm(weights, g)  # which is one operation where `@` is five


def pairwise_weights(theta: Tensor, phi: Tensor, form: Form, valid: Tensor | None) -> Tensor:
    """Return the weights w_ij (B, N, M); theta and phi are in at least float32, `valid` is (B or 1, N or 1, M)."""
    if not isinstance(form.pairwise, str):
        scores: Tensor = form.scale * check_scores(form.pairwise(theta, phi), theta, phi)
    elif form.pairwise == "concatenation":
        a, b = concat_summands(theta, phi, form)
        scores = form.scale * functional.relu(a + b.transpose(1, 2))
    else:
        scores = torch.bmm(theta if form.scale == 1 else form.scale * theta, phi.transpose(1, 2))
    if form.softmax:
        return softmax(scores, valid)
    if valid is None:
        return scores / phi.shape[1]
    count = valid.sum(dim=-1, keepdim=True).clamp(min=1)
    return scores.masked_fill(~valid, 0) / count


def softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Return the softmax over the valid keys, 0 in a row without any."""
    if valid is None:
        return scores.softmax(dim=-1)
    # A row without any key would be NaN: it is computed with every key, then set to 0.
    empty = ~valid.any(dim=-1, keepdim=True)
    return scores.masked_fill(~(valid | empty), -torch.inf).softmax(dim=-1).masked_fill(~valid, 0)


def concat_summands(theta: Tensor, phi: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return a (B, N, 1) and b (B, M, 1), whose sum before the ReLU is the score of the concatenation form."""
    # Theta alone may be folded to one channel, so the parts of the weight need not be halves.
    size = theta.shape[-1]
    weight = form.concat_weight.to(theta.dtype).reshape(1, -1)
    a, b = functional.linear(theta, weight[:, :size]), functional.linear(phi, weight[:, size:])
    return a if form.concat_bias is None else a + form.concat_bias.to(theta.dtype), b


def count_keys(phi: Tensor, key_mask: Tensor | None) -> Tensor | int:
    """Return the number of valid keys, at least 1: an int, or `(B, 1, 1)` in at least float32 under a mask."""
    if key_mask is None:
        return phi.shape[1]
    return key_mask.sum(dim=1).clamp(min=1)[:, None, None].to(torch.promote_types(phi.dtype, torch.float32))
