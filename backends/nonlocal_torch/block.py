"""The non-local block as a PyTorch module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nonlocal_core.checks import check_arrays, check_params, check_positions
from nonlocal_core.errors import fail_type
from nonlocal_core.form import Form, form_of
from nonlocal_core.options import SpecOptions
from nonlocal_core.parameters import initial_moments, param_shapes
from nonlocal_core.planning import check_method
from nonlocal_core.sets import Sets
from nonlocal_core.spec import NonLocalSpec
from nonlocal_torch.op import aggregate, pairwise_weights

__all__ = ["NonLocalBlock"]

_STATE_NAMES = {"norm.mean": "norm.running_mean", "norm.variance": "norm.running_var"}
_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class NonLocalBlock(nn.Module):
    """Add to every position of its input what it gathers from all others (Wang et al., CVPR 2018, equation 6).

    One class serves sequences, images and videos: the rank comes from the input. In training mode batch
    normalisation uses the statistics of the input. Parameters are cast to the compute dtype: autocast's if it
    is on, else that of the input; scores, weights and sums over keys are at least float32.

    Args:
        channels: C, the channels of the input and of the output.
        method: how the operation is computed: "auto" or "pairwise" (the N x M matrix).
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

    spec: NonLocalSpec

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
        self.spec, self.method = NonLocalSpec(channels=channels, **options), method
        check_method(method, self.spec.pairwise)
        shapes = param_shapes(self.spec)
        for layer in self.spec.layers:
            shape, has_bias = shapes[f"{layer}.weight"], self.spec.bias[layer]
            if layer == "concat":
                self.concat = _parameters(shapes, "concat", device, dtype)
            else:
                setattr(self, layer, nn.Linear(*shape[::-1], bias=has_bias, device=device, dtype=dtype))
        self.norm: nn.Module | None = None
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
        options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        return cls(**options, method=method, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: weights normal with standard deviation 0.01, and the last factor 0 with `zero_init`."""
        for name, tensor in self._canonical().items():
            mean, deviation = initial_moments(name, self.spec)
            nn.init.normal_(tensor, mean, deviation) if deviation else nn.init.constant_(tensor, mean)
        if isinstance(self.norm, nn.BatchNorm1d):
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
        sets = self._check(x, key_mask, self.training)
        flat = x.flatten(2).mT  # (B, N, C)
        theta = _cut(self._queries(flat), sets).flatten(1, -2)
        phi, g, valid = self._keys(x, sets, key_mask)
        y = aggregate(theta, phi, g, self._form(), valid, self.method)
        r = self._project(_uncut(y, sets), "out").mT  # (B, C, N)
        z = self._normalize(r).reshape(x.shape).to(x.dtype)
        return x + z if self.spec.residual else z.contiguous(memory_format=_layout(x))

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
        sets = self._check(x, key_mask, training=False)
        flat = x.flatten(2).mT
        queries, keys = _set_numbers(sets, x.device)
        if positions is not None:
            indices = positions.tolist() if isinstance(positions, Tensor) else positions
            chosen = torch.as_tensor(check_positions(indices, flat.shape[1]), device=x.device)
            flat, queries = flat[:, chosen], queries[chosen]
        phi, _, mask = self._keys(x, sets, key_mask)
        valid = (queries[:, None] == keys)[None]
        if mask is not None:
            valid = valid & _uncut(mask[..., None], sets).mT
            phi = phi.masked_fill(~mask[..., None], 0)
        return pairwise_weights(self._queries(flat), _uncut(phi, sets), self._form(), valid).to(x.dtype)

    @torch.no_grad()
    def export_params(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return a copy of the parameters under their canonical names, as NumPy arrays (bfloat16 as float32)."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self._canonical().items()}
        return {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def import_params(self, params: Mapping[str, Any]) -> None:
        """Take over parameters under their canonical names; nothing changes if they do not fit.

        Args:
            params: a mapping from exactly the names of `nonlocal_core.param_shapes(self.spec)` to arrays.

        Raises:
            TypeError: if `params` is not a mapping.
            ValueError: if a parameter is missing or unknown, or has a wrong shape.
        """
        check_params(params, self.spec)
        # float64 holds the numbers of every other dtype, of bfloat16 too, which PyTorch does not take from NumPy.
        given = {name: torch.as_tensor(np.asarray(params[name]).astype(np.float64)) for name in params}
        for name, tensor in self._canonical().items():
            tensor.copy_(given[name])

    def extra_repr(self) -> str:
        """Show the options that differ from their defaults."""
        shown = [f"{name}={value!r}" for name, value in self.spec.changed_options().items()]
        if self.method != "auto":
            shown.append(f"method={self.method!r}")
        return ", ".join([f"{self.spec.channels}", *shown])

    def _canonical(self) -> dict[str, Tensor]:
        """Return the live parameters and statistics under their canonical names."""
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: state[_STATE_NAMES.get(name, name)] for name in param_shapes(self.spec)}

    def _check(self, x: Tensor, key_mask: Tensor | None, training: bool) -> Sets:
        if not isinstance(x, Tensor):
            raise fail_type("x", "be a torch.Tensor", x)
        shape = (*x.shape[:1], *x.shape[2:], *x.shape[1:2])
        check_arrays(self.spec, shape, x, key_mask, training=training)
        return self.spec.sets(x.shape[2:])

    def _form(self) -> Form:
        """Return what says how scores become weights."""
        concat = self.concat.items() if self.spec.pairwise == "concatenation" else ()
        return form_of(self.spec, {f"concat.{kind}": parameter for kind, parameter in concat})

    def _project(self, a: Tensor, name: str) -> Tensor:
        """Return W a + b on the last axis, in the compute dtype."""
        layer = self.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.to(a.dtype)
        return functional.linear(a, layer.weight.to(a.dtype), bias)

    def _queries(self, flat: Tensor) -> Tensor:
        return self._project(flat, "theta") if self.spec.has_embedding else flat

    def _keys(self, x: Tensor, sets: Sets, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return phi and g (B', M, C') and which keys are valid (B', M), for each set."""
        mask = None
        if key_mask is not None:
            mask = _cut(key_mask.flatten(1)[..., None], sets)
            x = x.masked_fill(~key_mask[:, None], 0)
        valid = None if mask is None else _pool(mask.to(x.dtype), sets, None)[..., 0] > 0
        flat = x.flatten(2).mT
        if self.spec.subsample_at == "input":
            pooled = _pool(_cut(flat, sets), sets, mask)
            phi = self._project(pooled, "phi") if self.spec.has_embedding else pooled
            return phi, self._project(pooled, "g"), valid
        phi = self._project(flat, "phi") if self.spec.has_embedding else flat
        return (
            _pool(_cut(phi, sets), sets, mask),
            _pool(_cut(self._project(flat, "g"), sets), sets, mask),
            valid,
        )

    def _normalize(self, r: Tensor) -> Tensor:
        if self.norm is None:
            return r
        if self.spec.norm == "affine":
            return r * self.norm["weight"].to(r.dtype)[:, None] + self.norm["bias"].to(r.dtype)[:, None]
        return self.norm(r.to(self.norm.weight.dtype))


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


def _cut(a: Tensor, sets: Sets) -> Tensor:
    """Take `(B, N, C)` apart into sets, `(B', *inner, C)`."""
    a = a.reshape(a.shape[0], *sets.grid, a.shape[-1])
    return a.permute(sets.cut_axes).flatten(0, len(sets.outer))


def _uncut(a: Tensor, sets: Sets) -> Tensor:
    """Put the queries or the keys of all sets, `(B', N', C)`, back in row-major order, `(B, N, C)`."""
    inner = sets.inner_sizes if a.shape[1] == sets.queries else sets.key_sizes
    a = a.reshape(-1, *sets.outer_sizes, *inner, a.shape[-1])
    return a.permute(sets.uncut_axes).flatten(1, -2)


def _pool(a: Tensor, sets: Sets, mask: Tensor | None) -> Tensor:
    """Return the largest valid value of each window of `(B', *inner, C)` as `(B', M, C)`, 0 where none is."""
    if sets.window is None:
        return a.flatten(1, -2)
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf)
    a = _POOLS[len(sets.inner)](a.movedim(-1, 1), sets.window).flatten(2).mT
    return a if mask is None else a.masked_fill(a == -torch.inf, 0)


def _set_numbers(sets: Sets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of the set of each query (N,) and of each key (M,), in row-major order."""
    numbers = torch.arange(sets.count, device=device)[:, None, None]
    return tuple(_uncut(numbers.expand(-1, size, 1), sets)[0, :, 0] for size in (sets.queries, sets.keys))


def _layout(x: Tensor) -> torch.memory_format:
    """Return the memory layout of `x`, for a result that should have the same."""
    last = _LAYOUTS.get(x.dim())
    if last and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format
