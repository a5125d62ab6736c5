"""What PyTorch is doing while a call runs, and the precision in which the operation is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["full_precision", "is_recorded", "is_transformed", "widened"]


def is_recorded(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done to any of these tensors."""
    return torch.is_grad_enabled() and any(a.requires_grad for a in tensors)


def is_transformed() -> bool:
    """Return whether the call is inside a transform of `torch.func`, such as `vmap` or `grad`."""
    return torch._C._are_functorch_transforms_active()  # noqa: SLF001 - nothing public says it


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast, for devices that have one."""
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # PyTorch's own has no types
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # which PyTorch's compiler could not trace before 2.12


def widened(a: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return a.to(torch.promote_types(a.dtype, torch.float32))
