"""The non-local block as a Flax module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nonlocal_core.arguments import check_floating
from nonlocal_core.errors import fail_type
from nonlocal_core.networks.folding import fold_norm
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import SpecOptions
from nonlocal_core.spec.parameters import STATISTICS, check_params, initial_moments, param_shapes
from nonlocal_jax.function import attention, block_and_moments, running

__all__ = ["NonLocalBlock"]


class NonLocalBlock(nnx.Module):
    """Add to every position of its input what it gathers from all others (Wang et al., CVPR 2018, equation 6).

    One class serves sequences, images and videos: the rank comes from the input. As with `nnx.BatchNorm`, a new
    block is in training mode, in which batch normalisation uses the statistics of the input and moves the
    running ones; `eval()`, `train()` and `nnx.view` change that. Parameters are `nnx.Param` under the names
    `theta.weight`, ..., and running statistics are `nnx.BatchStat`, at least float32.

    Args:
        channels: C, the channels of the input and of the output.
        rngs: the source of the random weights, its stream `params`.
        method: how the operation is computed: "auto", "pairwise" (the N x M matrix), or the method without it that
            serves the form: "streamed", "reassociated" or "sorted".
        dtype: the dtype of the computation; scores, weights and sums over keys are at least float32. None: that
            of the input.
        param_dtype: the dtype of the parameters.
        **options: the other options of `nonlocal_core.NonLocalSpec`.

    Raises:
        TypeError: if an option has a wrong type or is unknown.
        ValueError: if an option has a wrong value.

    Example:
        >>> block = NonLocalBlock(64, subsample=2, norm="batch", rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(1), (2, 14, 14, 64))
        >>> bool((block(x) == x).all())  # a new block is the identity
        True
        >>> block.attention(x, positions=[0, 97]).shape
        (2, 2, 49)
    """

    def __init__(
        self,
        channels: int,
        *,
        rngs: nnx.Rngs,
        method: str = "auto",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        **options: Unpack[SpecOptions],
    ) -> None:
        """Create the parameters; see the class for the arguments."""
        self.spec, self.method = NonLocalSpec(channels=channels, **options), method
        check_method(method, self.spec.pairwise)
        if not isinstance(rngs, nnx.Rngs):
            raise fail_type("rngs", "be a flax.nnx.Rngs", rngs)
        for argument, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            if value is not None:
                check_floating(argument, jnp.dtype(value).name)
        self.dtype, self.param_dtype = dtype, param_dtype
        self.use_running_average = False
        layers: dict[str, dict[str, Any]] = {}
        for name, shape in param_shapes(self.spec).items():
            layer, _, kind = name.partition(".")
            mean, deviation = initial_moments(name, self.spec)
            if name in STATISTICS:
                variable = nnx.BatchStat(jnp.full(shape, mean, jnp.promote_types(param_dtype, jnp.float32)))
            elif deviation:
                noise = jax.random.normal(rngs.params(), shape, param_dtype)
                variable = nnx.Param(mean + deviation * noise)
            else:
                variable = nnx.Param(jnp.full(shape, mean, param_dtype))
            layers.setdefault(layer, {})[kind] = variable
        for layer, variables in layers.items():
            setattr(self, layer, nnx.Dict(variables))

    @classmethod
    def from_spec(
        cls,
        spec: NonLocalSpec,
        *,
        rngs: nnx.Rngs,
        method: str = "auto",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> Self:
        """Return a new block that computes `spec`."""
        options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        return cls(**options, rngs=rngs, method=method, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: Array, key_mask: Array | None = None) -> Array:
        """Return z_i = x_i + norm(W_z y_i + b_z).

        Args:
            x: `(B, S1..Sk, C)`, k = 1, 2 or 3, floating point.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key. None: everywhere.

        Returns:
            z, with the shape and the dtype of `x`.

        Raises:
            TypeError: if `x` is not floating point or `key_mask` is not boolean.
            ValueError: if a shape does not fit the spec.
        """
        params, training = self._params(), not self.use_running_average
        z, found = block_and_moments(x, params, self.spec, key_mask, training, method=self.method, dtype=self.dtype)
        if found is not None:
            self._assign(running(params, self.spec, found))
        return z

    def attention(self, x: Array, positions: Any = None, key_mask: Array | None = None) -> Array:
        """Return rows of the weights w_ij with which the block sums its keys.

        Args:
            x: `(B, S1..Sk, C)`.
            positions: flat indices of Q queries, row-major, known when the block is traced. None: all N.
            key_mask: `(B, S1..Sk)`, True where a position serves as a key.

        Returns:
            `(B, Q, M)` in the dtype of `x`: M counts every key of the pooled grid in row-major order, and the
            weight is 0 where a key is masked or lies outside the set of the query.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if a shape does not fit the spec or a position is out of range.
        """
        return attention(x, self._params(), self.spec, positions, key_mask, dtype=self.dtype)

    def export_params(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return a copy of the parameters under their canonical names, as NumPy arrays (bfloat16 as float32)."""
        return {
            name: np.array(array, np.float32 if array.dtype == jnp.bfloat16 else array.dtype)
            for name, array in self._params().items()
        }

    def import_params(self, params: Mapping[str, Any]) -> None:
        """Take over parameters under their canonical names; nothing changes if they do not fit.

        Args:
            params: a mapping from exactly the names of `nonlocal_core.param_shapes(self.spec)` to arrays.

        Raises:
            TypeError: if `params` is not a mapping.
            ValueError: if a parameter is missing or unknown, or has a wrong shape.
        """
        check_params(params, self.spec)
        self._assign({name: _like(old, params[name]) for name, old in self._params().items()})

    def fold_norm(self) -> Self:
        """Return a new block without norm that computes what this one computes in evaluation.

        Method, devices, dtypes and mode are those of this block; see `nonlocal_core.fold_norm` for the formulas.

        Raises:
            ValueError: if there is no norm.

        Example:
            >>> block = NonLocalBlock(64, norm="batch", zero_init=False, rngs=nnx.Rngs(0))
            >>> block.eval()
            >>> folded, x = block.fold_norm(), jax.random.normal(jax.random.key(1), (2, 9, 64))
            >>> folded.spec.norm, bool(jnp.allclose(folded(x), block(x), atol=1e-6))
            (None, True)
        """
        params, spec = fold_norm(self.export_params(), self.spec)
        folded = self.from_spec(
            spec, rngs=nnx.Rngs(0), method=self.method, dtype=self.dtype, param_dtype=self.param_dtype
        )
        folded.use_running_average = self.use_running_average
        old = self._params()
        # A bias that was not there has the shape of the norm's.
        for name, array in params.items():
            folded._variable(name)[...] = _like(old.get(name, old["norm.bias"]), array)  # noqa: SLF001 - its own
        return folded

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view, for `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _variable(self, name: str) -> Any:
        layer, _, kind = name.partition(".")
        return getattr(self, layer)[kind]

    def _params(self) -> dict[str, Array]:
        """Return the parameters and statistics under their canonical names."""
        return {name: self._variable(name)[...] for name in param_shapes(self.spec)}

    def _assign(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            self._variable(name)[...] = array


def _like(old: Array, new: Any) -> Array:
    """Return a new value in the dtype of the old one."""
    # Bound to a device only where the old array was: else it could not meet arrays on several.
    return jax.device_put(np.asarray(new).astype(old.dtype), old.sharding if old.committed else None)
