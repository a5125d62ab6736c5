"""What is measured in PyTorch: this project's block and those of the other implementations, on tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nonlocal_conformance import loader
from nonlocal_core import NonLocalSpec
from nonlocal_torch import NonLocalBlock

from .arrays import input_of, params_of, positions_of
from .case import PEERS, PLAIN, Case
from .plain import plain

__all__ = ["forward", "peak", "product", "rows", "seconds", "spec_of", "to_numpy", "training"]

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

    def run() -> Any:
        with torch.no_grad(), _precision(case):
            return block(x)

    return partial(_waited, case, run)


def training(case: Case) -> Callable[[], Any]:
    """Return a training step: the gradients for dz, that of z."""
    block, x, dz = _block(case).train(), _input(case).requires_grad_(), _input(case, seed=2)
    leaves = [x, *(one for one in block.parameters() if one.requires_grad)]

    def run() -> Any:
        with _precision(case):
            z = block(x)
        return torch.autograd.grad(z, leaves, dz.to(z.dtype))

    return partial(_waited, case, run)


def rows(case: Case) -> Callable[[], Any]:
    """Return the call for some rows of the weights."""
    block: Any = _block(case).eval()
    x, positions = _input(case), positions_of(case.positions)

    def run() -> Any:
        with torch.no_grad(), _precision(case):
            return block.attention(x, positions)

    return partial(_waited, case, run)


def product(case: Case, size: int) -> Callable[[], Any]:
    """Return the product of two square matrices, for comparison."""
    matrix = torch.randn(size, size, device=case.device, dtype=getattr(torch, case.dtype))
    return partial(_waited, case, lambda: matrix @ matrix)


def seconds(call: partial[Any]) -> float:
    """Return how long a GPU takes for a call, between two events of its own."""
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    call.args[1]()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


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


class _Plain(torch.nn.Module):
    """The plain matrix, with parameters of its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.spec = case.spec
        for name, array in params_of(case.spec).items():
            value = torch.nn.Parameter(
                torch.from_numpy(array).to(case.device), not name.startswith(("norm.m", "norm.v"))
            )
            self.register_parameter(name.replace(".", "_"), value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return z."""
        ops = SimpleNamespace(
            einsum=torch.einsum,
            linear=torch.nn.functional.linear,
            softmax=lambda scores: scores.softmax(-1),
            relu=torch.relu,
            norm=self.norm,
        )
        params = {name.replace("_", "."): value for name, value in self.named_parameters()}
        return x + plain(x.flatten(2).mT.contiguous(), params, self.spec, ops).mT.reshape(x.shape)

    def norm(self, r: Any, mean: Any, variance: Any, weight: Any, bias: Any) -> Any:
        """Return the batch norm of r, which in training updates the running statistics."""
        z = torch.nn.functional.batch_norm(
            r.flatten(0, 1), mean.detach(), variance.detach(), weight, bias, self.training, eps=self.spec.norm_epsilon
        )
        return z.view_as(r)


def _block(case: Case) -> Any:
    block = _Plain(case) if case.backend in PLAIN else _own_or_peer(case)
    if case.mode == "eager":
        return block
    torch.compiler.reset()  # or sizes that an earlier case had are taken for sizes that change
    return torch.compile(block, dynamic=False, mode="reduce-overhead" if case.mode == "graph" else None)


def _own_or_peer(case: Case) -> torch.nn.Module:
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


def _waited(case: Case, run: Callable[[], Any]) -> Any:
    result = run()
    _wait(case)
    return result


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
