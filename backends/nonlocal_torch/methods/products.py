"""Products of operands in half precision as they are: no copies of them in float32, and sums that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nonlocal_torch.context import HALVES, full_precision, takes_halves, widened

__all__ = ["multiply", "narrowed", "product"]


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a b` `(B, I, J)` in `dtype`, with derivatives of any order.

    Of the three one may be float32 while the others are in half precision.
    """
    if takes_halves(a) or takes_halves(b):
        return _with_gradient(a, b, dtype)
    return torch.bmm(widened(a), widened(b)).to(dtype)  # which is one operation where `@` is five


def product(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `a b` of operands in one half precision, as autograd does not record it.

    A sum over positions is to leave it in float32: a GPU may add parts of one in the dtype of the result.
    """
    if a.device.type not in {"cuda", "meta"} or torch.version.hip is not None:
        return torch.bmm(widened(a), widened(b)).to(dtype)
    return torch.bmm(a, b) if dtype == a.dtype else torch.bmm(a, b, out_dtype=dtype)


def narrowed(a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return numbers in half precision, and what to multiply by afterwards: the range of float16 is a small one."""
    if a.dtype == dtype or dtype != torch.float16:
        return a.to(dtype), None
    peak = torch.linalg.vector_norm(a, torch.inf, dim=(1, 2), keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    return (a / peak).to(dtype), peak


class _Product(torch.autograd.Function):
    """`multiply`, whose gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a, b)
        half = a.dtype if a.dtype in HALVES else b.dtype
        (a, for_a), (b, for_b) = narrowed(a, half), narrowed(b, half)
        factor = for_b if for_a is None else for_a
        return product(a, b, dtype) if factor is None else (factor * product(a, b)).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        with full_precision(dy.device.type):
            da = multiply(dy, b.mT, a.dtype) if ctx.needs_input_grad[0] else None
            db = multiply(a.mT, dy, b.dtype) if ctx.needs_input_grad[1] else None
        return da, db, None


_with_gradient: Callable[..., Tensor] = _Product.apply
