"""The non-local block as a PyTorch module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor, fx, nn

from nonlocal_core.arguments import check_choice
from nonlocal_core.errors import fail_type
from nonlocal_core.geometry import Sets
from nonlocal_core.networks.block import CanonicalBlock
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.block import options_of
from nonlocal_core.spec.calls import check_arrays, check_kind
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.options import SpecOptions, check_options
from nonlocal_core.spec.parameters import initial_moments, param_shapes
from nonlocal_torch.context import leaf
from nonlocal_torch.embed import clean, embed, result
from nonlocal_torch.layers import Layers, Scale, bare, fold_concat, map_of
from nonlocal_torch.op import aggregate
from nonlocal_torch.parameters import own_params, read_params, renew, renew_state, write_params
from nonlocal_torch.rows import weight_rows
from nonlocal_torch.sharded import Spread, call_spread, call_with, is_spread

__all__ = ["FORMATS", "NonLocalBlock"]

FORMATS = ("channels_first", "channels_last")


class NonLocalBlock(CanonicalBlock, nn.Module):
    """Add to every position of its input what it gathers from all others (Wang et al., CVPR 2018, equation 6).

    One class serves sequences, images and videos: the rank comes from the input. In training mode batch
    normalisation uses the statistics of the input. Parameters are cast to the compute dtype: autocast's if it
    is on, else that of the input; scores, weights and sums over keys are at least float32.

    Args:
        channels: C, the channels of the input and of the output.
        method: how the operation is computed: "auto", "pairwise" (the N x M matrix of weights), or the method
            without it that serves the form: "streamed", "reassociated" or "sorted".
        data_format: where the channels stand in `x` and z: "channels_first", `(B, C, S1..Sk)`, or "channels_last",
            `(B, S1..Sk, C)`.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        **options: the other options of `nonlocal_core.NonLocalSpec`.

    Raises:
        TypeError: if an option has a wrong type or is unknown.
        ValueError: if an option has a wrong value.

    Example:
        >>> block = NonLocalBlock(64, subsample=2, norm="batch")
        >>> x = torch.randn(2, 64, 14, 14)
        >>> torch.equal(block(x), x)  # a new block is the identity
        True
        >>> block.attention(x, positions=[0, 97]).shape
        torch.Size([2, 2, 49])
    """

    theta: nn.Module
    phi: nn.Module
    g: nn.Module
    concat: nn.Module
    out: nn.Module
    norm: nn.Module | None
    data_format = FORMATS[0]

    def __init__(
        self,
        channels: int,
        *,
        method: str = "auto",
        data_format: str = "channels_first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[SpecOptions],
    ) -> None:
        """Create the parameters; see the class for the arguments."""
        super().__init__()
        check_options(type(self), options)
        self.spec, self.method = NonLocalSpec(channels=channels, **options), method
        check_method(method, self.spec.pairwise)
        self.data_format = check_choice("data_format", data_format, FORMATS)
        shapes = param_shapes(self.spec)
        for layer in self.spec.layers:
            *leaving, entering = shapes[f"{layer}.weight"]
            bias = self.spec.bias[layer]
            setattr(self, layer, nn.Linear(entering, math.prod(leaving), bias, device=device, dtype=dtype))
        self.norm = None
        if self.spec.norm == "batch":
            self.norm = nn.BatchNorm1d(
                channels, self.spec.norm_epsilon, self.spec.norm_momentum, device=device, dtype=dtype
            )
        elif self.spec.norm == "affine":
            self.norm = Scale(channels, device, dtype)
        if isinstance(pairwise := self.spec.pairwise, nn.Module):
            self.pairwise = pairwise  # so that its parameters are those of the block
        self.reset_parameters()

    @classmethod
    def from_spec(
        cls,
        spec: NonLocalSpec,
        *,
        method: str = "auto",
        data_format: str = "channels_first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a new block that computes `spec`."""
        return cls(**options_of(spec), method=method, data_format=data_format, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: weights normal with standard deviation 0.01, and the last factor 0 with `zero_init`."""
        for name, tensor in own_params(self, self.spec).items():
            mean, deviation = initial_moments(name, self.spec)
            nn.init.normal_(tensor, mean, deviation) if deviation else nn.init.constant_(tensor, mean)
        if isinstance(self.norm, nn.BatchNorm1d) and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.zero_()

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Return z_i = x_i + norm(W_z y_i + b_z).

        Args:
            x: `(B, C, S1..Sk)`, k = 1, 2 or 3, floating point, in any memory layout.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key. None: everywhere.

        Returns:
            z, with the shape, the dtype and the memory layout of `x`.

        Raises:
            TypeError: if `x` is not floating point or `key_mask` is not boolean.
            ValueError: if a shape does not fit the spec.
        """
        if isinstance(x, fx.Proxy):
            return leaf(self, x, *([] if key_mask is None else [key_mask]))
        x = self._channels_first(x)
        # Without a sample there are no statistics to take, and none move.
        self._check(x, key_mask, training=self.training and x.shape[:1] != (0,))
        is_whole = not is_spread(x, key_mask)
        z = self._call(x, key_mask) if is_whole else call_spread(self, self.spec, self._call, x, key_mask)
        return z if self.data_format == FORMATS[0] else z.movedim(1, -1)

    def attention(
        self, x: Tensor, positions: Sequence[int] | Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Return rows of the weights w_ij with which the block sums its keys.

        Args:
            x: as in the forward pass.
            positions: flat indices of Q queries, row-major. None: all N.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key.

        Returns:
            `(B, Q, M)` in the dtype of `x`: M counts every key of the pooled grid in row-major order, and the
            weight is 0 where a key is masked or lies outside the set of the query.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if a shape does not fit the spec or a position is out of range.
        """
        x = self._channels_first(x)
        self._check(x, key_mask, training=False)
        if is_spread(x, key_mask):
            raise fail_type("x", "be whole, and so `key_mask`, for rows of weights: give its `full_tensor()`", x)
        return call_with(lambda _, a: a.full_tensor(), self, self._rows, x, key_mask, positions)

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`, in a network too."""
        rule = "hold no NonLocalBlock to be compiled by torch.jit.script; torch.export and torch.jit.trace take one"
        raise fail_type("obj", rule, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        renew(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        renew_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Show the options that differ from their defaults."""
        shown = [f"{name}={value!r}" for name, value in self.spec.changed_options().items()]
        if self.method != "auto":
            shown.append(f"method={self.method!r}")
        if self.data_format != FORMATS[0]:
            shown.append(f"data_format={self.data_format!r}")
        return ", ".join([f"{self.spec.channels}", *shown])

    def _canonical(self) -> dict[str, Tensor]:
        """Return what the forward pass reads under the canonical names."""
        return read_params(self, self.spec)

    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over the values of all parameters, which fit."""
        write_params(self, self.spec, params)

    def _like(self, spec: NonLocalSpec) -> Self:
        """Return a new block that computes `spec`; method, device, dtype and mode are those of this one."""
        weight = self._canonical()["out.weight"]
        block = self.from_spec(
            spec, method=self.method, data_format=self.data_format, device=weight.device, dtype=weight.dtype
        )
        return block.train(self.training)

    def _channels_first(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise fail_type("x", "be a torch.Tensor", x)
        return x if self.data_format == FORMATS[0] or x.dim() == 0 else x.movedim(-1, min(1, x.dim() - 1))

    def _check(self, x: Tensor, key_mask: Tensor | None, training: bool) -> None:
        check_kind(Tensor, key_mask=key_mask)
        check_arrays(self.spec, (*x.shape[:1], *x.shape[2:], *x.shape[1:2]), x, key_mask, training=training)

    def _call(self, x: Tensor, key_mask: Tensor | None, spread: Spread | None = None) -> Tensor:
        """Return z on checked arguments, of which `spread` says where the rest is."""
        sets, layers, form = self._prepare(x)
        x, lost = clean(x, key_mask)
        theta, phi, g, valid = embed(x, key_mask, layers, sets, self.spec.subsample_at)
        y = (aggregate if spread is None else spread.aggregate)(theta, phi, g, form, valid, self.method)
        z = result(y, x, key_mask, sets, self.out, self.norm, residual=self.spec.residual, spread=spread)
        return z if lost is None else torch.where(lost[:, None], torch.nan, z)

    def _rows(self, x: Tensor, key_mask: Tensor | None, positions: Sequence[int] | Tensor | None) -> Tensor:
        sets, layers, form = self._prepare(x)
        x, lost = clean(x, key_mask)
        return weight_rows(x, key_mask, lost, layers, form, sets, self.spec.subsample_at, positions).to(x.dtype)

    def _prepare(self, x: Tensor) -> tuple[Sets, Layers, Form]:
        """Return the sets of a grid, the layers that a call needs, and the form."""
        spec, sets = self.spec, self.spec.sets(x.shape[2:])
        if not spec.has_embedding:
            return sets, Layers(None, None, bare(self.g)), form_of(spec, {})
        theta, phi, g = bare(self.theta), bare(self.phi), bare(self.g)
        if spec.pairwise == "concatenation":
            concat = map_of(self.concat, 2 * spec.inner_channels)
            form = form_of(spec, {"concat.weight": concat.weight, "concat.bias": concat.bias})
            pooled = sets.window is not None and spec.subsample_at == "projection"
            theta, phi, form = fold_concat(x, theta, phi, form, pooled=pooled)
            return sets, Layers(theta, phi, g), form
        form = form_of(spec, {})
        form = dataclasses.replace(form, pairwise=self.pairwise) if "pairwise" in self._modules else form
        return sets, Layers(theta, phi, g), form
