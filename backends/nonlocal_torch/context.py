"""What PyTorch is doing while a call runs, and the precision in which the operation is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from nonlocal_core.errors import fail_value

__all__ = [
    "HALVES",
    "KINDS",
    "device_kind",
    "full_precision",
    "has_autocast",
    "is_exported",
    "is_recorded",
    "is_traced",
    "is_transformed",
    "leaf",
    "takes_halves",
    "widened",
]

HALVES = (torch.bfloat16, torch.float16)

KINDS = {"cpu": "cpu"}
"""What kind of device a type of PyTorch's is; any other is a "gpu"."""


def device_kind(a: Tensor) -> str:
    """Return what the planner calls the device of a tensor, "cpu" or "gpu"."""
    return KINDS.get(a.device.type, "gpu")


def is_exported() -> bool:
    """Return whether `torch.export` records the call."""
    # In PyTorch 2.11 the public question is answered with True in whatever `torch.compile` traces.
    return torch.compiler._is_exporting_flag  # noqa: SLF001


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


def has_autocast(device: str) -> bool:
    """Return whether a type of device can be under autocast."""
    # Before 2.12 PyTorch's compiler could not trace the question; of what it compiles for, all but "meta" have one.
    return (torch.compiler.is_compiling() and device != "meta") or torch.amp.is_autocast_available(device)


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast, for devices that have one."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def takes_halves(a: Tensor) -> bool:
    """Return whether products are made of operands as they are, in half precision: where a device is fast at that.

    Such a product has a derivative in a function alone, which no transform knows and no export holds.
    """
    if a.dtype not in HALVES or device_kind(a) == "cpu" or 0 in a.shape:
        return False
    return not (is_transformed() or is_exported() or is_traced())


def widened(a: Tensor) -> Tensor:
    """Return a tensor in at least float32."""
    return a.to(torch.promote_types(a.dtype, torch.float32))
