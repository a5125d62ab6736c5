"""The matrix of weights, and the context in which none of its sums loses digits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from nonlocal_core.spec.form import Form

__all__ = ["concat_halves", "full_precision", "is_recorded", "is_transformed", "pairwise_weights", "softmax"]


def pairwise_weights(theta: Tensor, phi: Tensor, form: Form, valid: Tensor | None) -> Tensor:
    """Return the weights w_ij (B, N, M), at least in float32; `valid` is (B or 1, N or 1, M)."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    with full_precision(theta.device.type):
        theta, phi = theta.to(dtype), phi.to(dtype)
        if not isinstance(form.pairwise, str):
            scores = form.scale * form.pairwise(theta, phi)
        elif form.pairwise == "concatenation":
            a, b = concat_halves(theta, phi, form)
            scores = form.scale * functional.relu(a + b.mT)
        else:
            scores = (form.scale * theta) @ phi.mT
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


def concat_halves(theta: Tensor, phi: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return a (B, N, 1) and b (B, M, 1), whose sum before the ReLU is the score of the concatenation form."""
    half = theta.shape[-1]
    weight = form.concat_weight.to(theta.dtype)
    a, b = functional.linear(theta, weight[None, :half]), functional.linear(phi, weight[None, half:])
    return a if form.concat_bias is None else a + form.concat_bias.to(theta.dtype), b


def is_recorded(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done to any of these tensors."""
    return torch.is_grad_enabled() and any(a.requires_grad for a in tensors)


def is_transformed() -> bool:
    """Return whether the call is inside a transform of `torch.func`, such as `vmap` or `grad`."""
    return torch._C._are_functorch_transforms_active()  # noqa: SLF001 - nothing public says it


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast, for devices that have one."""
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # which PyTorch's compiler could not trace before 2.12
