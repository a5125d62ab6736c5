"""What PyTorch is doing while a call runs, and the precision in which the operation is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from nonlocal_core.errors import fail_value

__all__ = ["full_precision", "is_recorded", "is_traced", "is_transformed", "leaf", "widened"]


def is_recorded(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done to any of these tensors."""
    return torch.is_grad_enabled() and any(a.requires_grad for a in tensors)


def is_transformed() -> bool:
    """Return whether the call is inside a transform of `torch.func`, such as `vmap` or `grad`."""
    return torch._C._are_functorch_transforms_active()  # noqa: SLF001 - nothing public says it


def is_traced() -> bool:
    """Return whether `torch.jit.trace` or the older exporter to ONNX records the call, whose sizes are tensors then."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def leaf(module: nn.Module, x: fx.Proxy, *rest: object) -> Any:
    """Return what stands for a call of a module in a symbolic trace, which cannot read its body.

    Raises:
        ValueError: if the module is the whole that is traced.
    """
    name = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not name:
        rule = "be a tensor: a symbolic trace keeps a block whole, so trace a network around it, `nn.Sequential(block)`"
        raise fail_value("x", rule, x)
    return x.tracer.create_proxy("call_module", name, (x, *rest), {})


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast, for devices that have one."""
    # Before 2.12 PyTorch's compiler could not trace the question; of what it compiles for, all but "meta" have one.
    is_known = torch.compiler.is_compiling() and device != "meta"
    return (
        torch.autocast(device, enabled=False) if is_known or torch.amp.is_autocast_available(device) else nullcontext()
    )


def widened(a: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return a.to(torch.promote_types(a.dtype, torch.float32))
