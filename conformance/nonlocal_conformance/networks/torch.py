"""A network in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from nonlocal_conformance.driver import Array, Params
from nonlocal_core import AttentionMap
from nonlocal_core.networks.insertion import Insertion
from nonlocal_torch import NonLocalBlock, attention_of, check_identity, insert_nonlocal, remove_nonlocal

__all__ = ["TorchNetwork"]


class TorchNetwork(nn.Module):
    """Linear layers in turn; `enter` makes a tensor of an input."""

    def __init__(self, layers: dict[str, torch.Tensor], enter: Callable[[Array], torch.Tensor]) -> None:
        """Take the matrices by the names of their layers."""
        super().__init__()
        self.enter = enter
        for name, weight in layers.items():
            self.add_module(name, _Linear(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call one layer after the other."""
        for layer in self.children():
            x = layer(x)
        return x

    def run(self, x: Array, *, training: bool = False) -> Array:
        """Return the output."""
        with torch.no_grad():
            return np.moveaxis(self.train(training)(self.enter(x)).cpu().numpy(), 1, -1)

    def state(self) -> Params:
        """Return what `state_dict` holds."""
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.state_dict().items()}

    def insert(self, after: Any, x: Array, **options: Any) -> list[Insertion]:
        """Put blocks in, in place."""
        return insert_nonlocal(self, after, example_input=self.enter(x), **options)

    def remove(self) -> None:
        """Take the blocks out, in place."""
        remove_nonlocal(self)

    def load(self, block: str, params: Params) -> None:
        """Let a block take parameters in."""
        cast("NonLocalBlock", self.get_submodule(block)).import_params(params)

    def check_identity(self) -> None:
        """Check that every block is the identity."""
        check_identity(self)

    def attention_of(self, x: Array, block: str | None = None, positions: Any = None) -> AttentionMap:
        """Return rows of the weights of a block."""
        return attention_of(self, self.enter(x), block, positions)


class _Linear(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oi,bi...->bo...", self.weight, x)
