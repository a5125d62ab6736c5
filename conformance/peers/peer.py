"""What the drivers of other implementations have in common: PyTorch modules, each with a preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from nonlocal_conformance import Case, Unsupported
from nonlocal_conformance.driver import dtype_of
from nonlocal_conformance.drivers.torch import TorchDriver
from nonlocal_core import NonLocalSpec, param_shapes
from nonlocal_core.geometry import window_of
from nonlocal_core.spec.parameters import STATISTICS

__all__ = ["Peer", "PeerBlock", "require"]

Array = np.ndarray[Any, Any]
Params = dict[str, Array]

_ATTRIBUTES = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def require(holds: bool, reason: str) -> None:
    """Raise `Unsupported` with the reason unless `holds`."""
    if not holds:
        raise Unsupported(reason)


class PeerBlock(torch.nn.Module):
    """A module of another package, with its parameters under their canonical names.

    Args:
        module: the module.
        layers: its layers by their canonical names, "norm" among them.
        spec: what it computes.
    """

    def __init__(self, module: torch.nn.Module, layers: Mapping[str, torch.nn.Module], spec: NonLocalSpec) -> None:
        """Keep the module, and the layers as they are in it."""
        super().__init__()
        self.spec = spec
        self.module, self.layers, self.shapes = module, layers, param_shapes(spec)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Call the module."""
        require(key_mask is None, "it takes no `key_mask`")
        return self.module(x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters and running statistics, in the shapes that they have in the module."""
        found = {
            f"{layer}.{name}": getattr(module, attribute, None)
            for layer, module in self.layers.items()
            for name, attribute in _ATTRIBUTES.items()
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Iterate over the canonical names and the parameters."""
        return iter([(name, tensor) for name, tensor in self.tensors().items() if name not in STATISTICS])

    def export_params(self) -> Params:
        """Return copies of the parameters in their canonical shapes."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.tensors().items()}
        return {name: a.reshape(self.shapes[name]).copy() for name, a in arrays.items()}

    def import_params(self, params: Params) -> None:
        """Take parameters in, all of them and no others."""
        tensors = self.tensors()
        if params.keys() != tensors.keys():
            message = f"the parameters must be {sorted(tensors)}. Got {sorted(params)}."
            raise ValueError(message)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(params[name]).reshape(tensor.shape))


class Peer(TorchDriver):
    """A driver of a module of another package; each subclass says which and how it is made."""

    methods = ("auto",)
    capabilities = frozenset({"export", "hvp", "initial", "layouts", "mixed", "steps", "train", "vjp"})
    preset: ClassVar[str]
    rank: ClassVar[int]
    cases: ClassVar[tuple[Case, ...]]
    free: ClassVar[frozenset[str]]
    """The options of the spec that the constructor leaves free, beside the form and the norm."""

    def make(self, spec: NonLocalSpec) -> torch.nn.Module:
        """Return a new module that computes what the spec says."""
        raise NotImplementedError

    def layers(self, module: Any) -> dict[str, torch.nn.Module]:
        """Return the layers of a module by their canonical names."""
        raise NotImplementedError

    def own(self, spec: NonLocalSpec) -> NonLocalSpec:
        """Return the spec that comes nearest among those that the module computes."""
        chosen = {name: getattr(spec, name) for name in ("pairwise", "norm", *self.free)}
        try:
            return NonLocalSpec.preset(self.preset, channels=spec.channels, rank=self.rank, **chosen)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def new(self, spec: NonLocalSpec) -> PeerBlock:
        """Return a new block, or raise `Unsupported` if the module computes something else than the spec says."""
        own = self.own(spec)
        for option in ("pairwise", *(field.name for field in dataclasses.fields(spec))):
            has, wanted = (getattr(one, option) for one in (own, spec))
            require(has == wanted, f"its `{option}` is {has!r}. Got {wanted!r}.")
        module = self.make(spec)
        return PeerBlock(module, self.layers(module), spec).to(self.device)

    def window(self, spec: NonLocalSpec) -> tuple[int, ...] | None:
        """Return the pooling window with one entry for each axis."""
        return window_of(spec.subsample, self.rank)

    def initial(self, spec: NonLocalSpec, seed: int = 0) -> Params:
        """Return the parameters of a new block."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.new(spec).export_params()

    def vjp(self, spec: NonLocalSpec, params: Params, *arguments: Any, **options: Any) -> tuple[Array, Params]:
        """Return the gradients of the input and of the parameters."""
        dx, dparams = super().vjp(spec, params, *arguments, **options)
        return dx, _reshaped(dparams, params)

    def hvp(
        self,
        spec: NonLocalSpec,
        params: Params,
        x: Array,
        dz: Array,
        vx: Array,
        vparams: Params,
        *arguments: Any,
        **options: Any,
    ) -> tuple[Array, Params]:
        """Return the gradients of <gradients, v>, reverse over reverse."""
        directions = _reshaped(vparams, self.new(spec).tensors())
        hx, hparams = super().hvp(spec, params, x, dz, vx, directions, *arguments, **options)
        return hx, _reshaped(hparams, params)

    def _block(self, spec: NonLocalSpec, params: Params, *, training: bool = False, method: str = "auto") -> PeerBlock:
        require(method == "auto", f"it has one method. Got {method!r}.")
        block = self.new(spec).to(getattr(torch, dtype_of(params)))
        block.import_params(params)
        return block.train(training)


def _reshaped(arrays: Params, like: Mapping[str, Any]) -> Params:
    """Return arrays in the shapes of others of the same names."""
    return {name: array.reshape(tuple(like[name].shape)) for name, array in arrays.items()}
