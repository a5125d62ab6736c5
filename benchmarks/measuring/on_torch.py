"""What is measured in PyTorch: this project's block and those of the other implementations, on tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nonlocal_conformance import loader
from nonlocal_core import NonLocalSpec
from nonlocal_torch import NonLocalBlock

from .arrays import input_of, params_of, positions_of
from .case import PEERS, Case

__all__ = ["forward", "peak", "product", "rows", "spec_of", "to_numpy", "training"]

_DRIVERS = {
    "mmcv": {1: "peers.mmcv:NonLocal1d", 2: "peers.mmcv:NonLocal2d", 3: "peers.mmcv:NonLocal3d"},
    "pytorchvideo": {3: "peers.pytorchvideo:NonLocal"},
    "slowfast": {3: "peers.slowfast:Nonlocal"},
    "timm": {2: "peers.timm:NonLocalAttn"},
}
"""The drivers of the conformance suite that make the blocks, by the number of spatial axes."""


def forward(case: Case) -> Callable[[], Any]:
    """Return the call of a block in evaluation."""
    block, x = _block(case).eval(), _input(case)

    def call() -> Any:
        with torch.no_grad(), _precision(case):
            z = block(x)
        _wait(case)
        return z

    return call


def training(case: Case) -> Callable[[], Any]:
    """Return a training step: the gradients for dz, that of z."""
    block, x, dz = _block(case).train(), _input(case).requires_grad_(), _input(case, seed=2)
    leaves = [x, *block.parameters()]

    def call() -> Any:
        with _precision(case):
            z = block(x)
        gradients = torch.autograd.grad(z, leaves, dz.to(z.dtype))
        _wait(case)
        return gradients

    return call


def rows(case: Case) -> Callable[[], Any]:
    """Return the call for some rows of the weights."""
    block: Any = _block(case).eval()
    x, positions = _input(case), positions_of(case.positions)

    def call() -> Any:
        with torch.no_grad(), _precision(case):
            weights = block.attention(x, positions)
        _wait(case)
        return weights

    return call


def product(case: Case, size: int) -> Callable[[], Any]:
    """Return the product of two square matrices, for comparison."""
    matrix = torch.randn(size, size, device=case.device, dtype=getattr(torch, case.dtype))

    def call() -> Any:
        result = matrix @ matrix
        _wait(case)
        return result

    return call


def peak(case: Case, call: Callable[[], Any]) -> int:
    """Return the most memory that a call on a GPU holds beside what is held already."""
    _wait(case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def to_numpy(z: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return an output as an array, channels last."""
    return z.movedim(1, -1).float().cpu().numpy()


def spec_of(case: Case) -> NonLocalSpec:
    """Return what the block computes, which for another implementation is what comes nearest to the case."""
    return _driver(case).own(case.spec) if case.backend in PEERS else case.spec


def _block(case: Case) -> torch.nn.Module:
    spec = spec_of(case)
    params = params_of(spec)
    if case.backend in PEERS:
        block = _driver(case).new(spec)
        block.import_params(params)
        return block.module
    own = NonLocalBlock.from_spec(spec, method=case.asked, device=case.device)
    own.import_params(params)
    return own


def _driver(case: Case) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the packages warn of when they are imported
        return loader.load(_DRIVERS[case.backend][len(case.shape) - 2], case.device)


def _input(case: Case, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(input_of(case.shape, seed)).movedim(-1, 1).contiguous().to(case.device)


def _precision(case: Case) -> torch.autocast:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype != "float32")


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
