"""The non-local block as a PyTorch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from nonlocal_core.errors import fail_value
from nonlocal_core.geometry import Sets
from nonlocal_core.networks.block import CanonicalBlock
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.block import options_of
from nonlocal_core.spec.calls import check_arrays, check_kind
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.options import SpecOptions, check_options
from nonlocal_core.spec.parameters import initial_moments, param_shapes
from nonlocal_torch.context import full_precision, widened
from nonlocal_torch.embed import embed, embed_rows, result
from nonlocal_torch.layers import Layers, fold_concat
from nonlocal_torch.methods.pairwise import pairwise_weights
from nonlocal_torch.op import aggregate

__all__ = ["NonLocalBlock"]

_STATE_NAMES = {"norm.mean": "norm.running_mean", "norm.variance": "norm.running_var"}

_PLAIN_NORM = {"norm.weight": 1.0, "norm.bias": 0.0}
"""The values with which a norm computes what one without these parameters does."""


class NonLocalBlock(CanonicalBlock, nn.Module):
    """Add to every position of its input what it gathers from all others (Wang et al., CVPR 2018, equation 6).

    One class serves sequences, images and videos: the rank comes from the input. In training mode batch
    normalisation uses the statistics of the input. Parameters are cast to the compute dtype: autocast's if it
    is on, else that of the input; scores, weights and sums over keys are at least float32.

    Args:
        channels: C, the channels of the input and of the output.
        method: how the operation is computed: "auto", "pairwise" (the N x M matrix of weights), or the method
            without it that serves the form: "streamed", "reassociated" or "sorted".
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

    theta: nn.Linear
    phi: nn.Linear
    g: nn.Linear
    concat: nn.ParameterDict
    out: nn.Linear
    norm: nn.Module | None

    def __init__(
        self,
        channels: int,
        *,
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[SpecOptions],
    ) -> None:
        """Create the parameters; see the class for the arguments."""
        super().__init__()
        check_options(type(self), options)
        self.spec, self.method = NonLocalSpec(channels=channels, **options), method
        check_method(method, self.spec.pairwise)
        shapes = param_shapes(self.spec)
        for layer in self.spec.layers:
            if layer == "concat":
                self.concat = _parameters(shapes, "concat", device, dtype)
            else:
                leaving, entering = shapes[f"{layer}.weight"]
                bias = self.spec.bias[layer]
                setattr(self, layer, nn.Linear(entering, leaving, bias, device=device, dtype=dtype))
        self.norm = None
        if self.spec.norm == "batch":
            self.norm = nn.BatchNorm1d(
                channels, self.spec.norm_epsilon, self.spec.norm_momentum, device=device, dtype=dtype
            )
        elif self.spec.norm == "affine":
            self.norm = _parameters(shapes, "norm", device, dtype)
        self.reset_parameters()

    @classmethod
    def from_spec(
        cls,
        spec: NonLocalSpec,
        *,
        method: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a new block that computes `spec`."""
        return cls(**options_of(spec), method=method, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: weights normal with standard deviation 0.01, and the last factor 0 with `zero_init`."""
        for name, tensor in self._canonical().items():
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
        sets, layers, form = self._prepare(x, key_mask, self.training)
        theta, phi, g, valid = embed(x, key_mask, layers, sets, self.spec.subsample_at)
        y = aggregate(theta, phi, g, form, valid, self.method)
        return result(y, x, sets, self.out, self.norm, residual=self.spec.residual)

    def attention(
        self, x: Tensor, positions: Sequence[int] | Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Return rows of the weights w_ij with which the block sums its keys.

        Args:
            x: `(B, C, S1..Sk)`.
            positions: flat indices of Q queries, row-major. None: all N.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key.

        Returns:
            `(B, Q, M)` in the dtype of `x`: M counts every key of the pooled grid in row-major order, and the
            weight is 0 where a key is masked or lies outside the set of the query.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if a shape does not fit the spec or a position is out of range.
        """
        sets, layers, form = self._prepare(x, key_mask, training=False)
        theta, phi, pairs = embed_rows(x, key_mask, layers, sets, self.spec.subsample_at, positions)
        with full_precision(x.device.type):
            return pairwise_weights(widened(theta), widened(phi), form, pairs).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the options that differ from their defaults."""
        shown = [f"{name}={value!r}" for name, value in self.spec.changed_options().items()]
        if self.method != "auto":
            shown.append(f"method={self.method!r}")
        return ", ".join([f"{self.spec.channels}", *shown])

    def _canonical(self) -> dict[str, Tensor]:
        """Return the live parameters and statistics under their canonical names.

        A norm without weight and bias, which a user has put here, computes as with 1 and 0, and so it is described.
        """
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in _PLAIN_NORM.items():
            if self.norm is not None and name not in state:
                state[name] = torch.full_like(self.out.weight[:, 0], value)
        return {name: state[_STATE_NAMES.get(name, name)] for name in param_shapes(self.spec)}

    @torch.no_grad()
    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take over the values of all parameters, which fit."""
        own = dict(self.named_parameters())
        for name, value in _PLAIN_NORM.items():
            if name in params and name not in own and np.any(params[name] != value):
                label, rule = f"params[{name!r}]", f"be {value:g} throughout, since the norm here has none of its own"
                raise fail_value(label, rule, "other values")
        for name, tensor in self._canonical().items():
            tensor.copy_(torch.from_numpy(params[name]))

    def _like(self, spec: NonLocalSpec) -> Self:
        """Return a new block that computes `spec`; method, device, dtype and mode are those of this one."""
        weight = self.out.weight
        block = self.from_spec(spec, method=self.method, device=weight.device, dtype=weight.dtype)
        return block.train(self.training)

    def _prepare(self, x: Tensor, key_mask: Tensor | None, training: bool) -> tuple[Sets, Layers, Form]:
        """Check the arguments of a call; return the sets of its grid, the layers that it needs, and the form."""
        check_kind(Tensor, x=x, key_mask=key_mask)
        spec, shape = self.spec, (*x.shape[:1], *x.shape[2:], *x.shape[1:2])
        check_arrays(spec, shape, x, key_mask, training=training)
        sets = spec.sets(x.shape[2:])
        if spec.pairwise == "concatenation":
            form = form_of(spec, {f"concat.{kind}": parameter for kind, parameter in self.concat.items()})
            pooled = sets.window is not None and spec.subsample_at == "projection"
            theta, phi, form = fold_concat(x, self.theta, self.phi, form, pooled=pooled)
            return sets, Layers(theta, phi, self.g), form
        form = form_of(spec, {})
        return sets, Layers(self.theta, self.phi, self.g) if spec.has_embedding else Layers(None, None, self.g), form


def _parameters(
    shapes: dict[str, tuple[int, ...]],
    layer: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.ParameterDict:
    """Return the parameters of a layer that is no module of PyTorch's."""
    return nn.ParameterDict(
        {
            name.partition(".")[2]: nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            for name, shape in shapes.items()
            if name.startswith(f"{layer}.")
        }
    )
