"""The non-local block as a PyTorch module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from nonlocal_core.arguments import check_positions
from nonlocal_core.errors import fail_type
from nonlocal_core.geometry import Sets
from nonlocal_core.networks.folding import fold_norm
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_arrays
from nonlocal_core.spec.form import Form, form_of
from nonlocal_core.spec.options import SpecOptions
from nonlocal_core.spec.parameters import check_params, initial_moments, param_shapes
from nonlocal_torch.layers import Affine, followed, layout, project, project_back, shortened
from nonlocal_torch.op import aggregate
from nonlocal_torch.sets import cut, pool, set_numbers, uncut
from nonlocal_torch.weights import pairwise_weights

__all__ = ["NonLocalBlock"]

_STATE_NAMES = {"norm.mean": "norm.running_mean", "norm.variance": "norm.running_var"}


class NonLocalBlock(nn.Module):
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
        layers, form = self._layers(x, sets)
        theta, phi, g, valid = _embed(x, layers, sets, key_mask, self.spec.subsample_at)
        y = aggregate(theta, phi, g, form, valid, self.method)
        z = self._result(uncut(y, sets), x)
        return x + z if self.spec.residual else z.contiguous(memory_format=layout(x))

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
        layers, form = self._layers(x, sets)
        flat, (queries, keys) = _flat(x, layers), set_numbers(sets, x.device)
        mask, valid = _masks(key_mask, sets)
        if self.spec.subsample_at == "projection":
            phi = pool(cut(project(flat, layers, ["phi"])[0], sets), sets, mask)
        else:
            (phi,) = project(pool(cut(flat, sets), sets, mask), layers, ["phi"])
        if positions is not None:
            indices = positions.tolist() if isinstance(positions, Tensor) else positions
            chosen = torch.as_tensor(check_positions(indices, flat.shape[1]), device=x.device)
            flat, queries = flat[:, chosen], queries[chosen]
        same = (queries[:, None] == keys)[None]
        if valid is not None:
            same = same & uncut(valid[..., None], sets).mT
            phi = phi.masked_fill(~valid[..., None], 0)
        (theta,) = project(flat, layers, ["theta"])
        return pairwise_weights(theta, uncut(phi, sets), form, same).to(x.dtype)

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

    def fold_norm(self) -> Self:
        """Return a new block without norm that computes what this one computes in evaluation.

        Method, device, dtype and mode are those of this block; see `nonlocal_core.fold_norm` for the formulas.

        Raises:
            ValueError: if there is no norm.

        Example:
            >>> block = NonLocalBlock(64, norm="batch", zero_init=False).eval()
            >>> folded, x = block.fold_norm(), torch.randn(2, 64, 9)
            >>> folded.norm, torch.allclose(folded(x), block(x), atol=1e-6)
            (None, True)
        """
        params, spec = fold_norm(self.export_params(), self.spec)
        weight = self.out.weight
        folded = self.from_spec(spec, method=self.method, device=weight.device, dtype=weight.dtype)
        folded.import_params(params)
        return folded.train(self.training)

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
        if key_mask is not None and not isinstance(key_mask, Tensor):
            raise fail_type("key_mask", "be a torch.Tensor or None", key_mask)
        shape = (*x.shape[:1], *x.shape[2:], *x.shape[1:2])
        check_arrays(self.spec, shape, x, key_mask, training=training)
        return self.spec.sets(x.shape[2:])

    def _layers(self, x: Tensor, sets: Sets) -> tuple[dict[str, Affine], Form]:
        """Return the layers among theta, phi and g, in the dtype of `x`, and the form of what they give."""
        layers = {name: self._layer(name, x.dtype) for name in ("theta", "phi", "g") if name in self.spec.layers}
        if self.spec.pairwise != "concatenation":
            return layers, form_of(self.spec, {})
        form = form_of(self.spec, {f"concat.{kind}": parameter for kind, parameter in self.concat.items()})
        return shortened(x, layers, form, pooled=sets.window is not None and self.spec.subsample_at == "projection")

    def _layer(self, name: str, dtype: torch.dtype) -> Affine:
        layer = getattr(self, name)
        return Affine(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))

    def _result(self, y: Tensor, x: Tensor) -> Tensor:
        """Return r = norm(W y + b) in the shape and the dtype of `x`."""
        fixed = self._fixed_norm()
        if fixed is not None:
            layer = followed(self._layer("out", fixed[0].dtype), *fixed)
            return project_back(y, layer.to(y.dtype), x).to(x.dtype)
        r = project_back(y, self._layer("out", y.dtype), x)
        if self.norm is not None:
            r = r.flatten(2).to(self.norm.weight.dtype).contiguous()  # or PyTorch's norm takes twice the time
            r = self.norm(r).reshape(x.shape)
        return r.to(x.dtype)

    def _fixed_norm(self) -> tuple[Tensor, Tensor] | None:
        """Return factor and shift of a norm that takes no statistics and is nobody's but this block's, else None."""
        norm = self.norm
        if isinstance(norm, nn.ParameterDict):
            return norm["weight"], norm["bias"]
        if type(norm) is not nn.BatchNorm1d or norm.training or norm.running_var is None:
            return None
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(norm, name) for name in hooks):
            return None
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return factor, norm.bias - norm.running_mean * factor


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


def _embed(
    x: Tensor, layers: Mapping[str, Affine], sets: Sets, key_mask: Tensor | None, subsample_at: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return theta (B', N, C'), phi and g (B', M, C') and which keys are valid (B', M), for each set."""
    flat, (mask, valid) = _flat(x, layers), _masks(key_mask, sets)
    if sets.window is None or subsample_at == "projection":
        theta, *keys = project(flat, layers, ["theta", "phi", "g"])
        phi, g = (pool(cut(a, sets), sets, mask) for a in keys)
    else:
        (theta,) = project(flat, layers, ["theta"])
        phi, g = project(pool(cut(flat, sets), sets, mask), layers, ["phi", "g"])
    return cut(theta, sets).flatten(1, -2), phi, g, valid


def _flat(x: Tensor, layers: Mapping[str, Affine]) -> Tensor:
    """Return `x` as (B, N, C); where it is theta itself, with no gaps between the channels of a position."""
    flat = x.flatten(2).mT
    return flat if "theta" in layers else flat.contiguous()


def _masks(key_mask: Tensor | None, sets: Sets) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask as `pool` takes it (B', *inner, 1), and which keys are valid (B', M)."""
    if key_mask is None:
        return None, None
    mask = cut(key_mask.flatten(1)[..., None], sets)
    return mask, pool(mask.to(torch.float32), sets, None)[..., 0] > 0
