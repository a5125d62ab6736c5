"""The non-local block as a Flax module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nonlocal_core.arguments import check_floating
from nonlocal_core.errors import fail_type
from nonlocal_core.networks.block import CanonicalBlock
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.block import options_of
from nonlocal_core.spec.options import SpecOptions, check_options
from nonlocal_core.spec.parameters import STATISTICS, initial_moments, param_shapes
from nonlocal_jax.function import attention, block_and_statistics, running_statistics

__all__ = ["NonLocalBlock"]


class NonLocalBlock(CanonicalBlock, nnx.Module):
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
        check_options(type(self), options)
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
            variable: nnx.Variable[Array]
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
        return cls(**options_of(spec), rngs=rngs, method=method, dtype=dtype, param_dtype=param_dtype)

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
        variables, training = self._variables(), not self.use_running_average
        params = {name: variable[...] for name, variable in variables.items()}
        z, found = block_and_statistics(x, params, self.spec, key_mask, training, method=self.method, dtype=self.dtype)
        if found:
            for name, value in running_statistics(params, self.spec, found).items():
                variables[name][...] = value
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
        return attention(x, self._canonical(), self.spec, positions, key_mask, dtype=self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view, for `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _variables(self) -> dict[str, nnx.Variable[Array]]:
        """Return the variables under their canonical names."""
        names = {name: name.partition(".") for name in param_shapes(self.spec)}
        return {name: getattr(self, layer)[kind] for name, (layer, _, kind) in names.items()}

    def _canonical(self) -> dict[str, Array]:
        return {name: variable[...] for name, variable in self._variables().items()}

    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        variables = self._variables()
        values = {name: _in_place_of(variables[name][...], value) for name, value in params.items()}
        for name, value in values.items():
            variables[name][...] = value

    def _like(self, spec: NonLocalSpec) -> Self:
        block = self.from_spec(
            spec, rngs=nnx.Rngs(0), method=self.method, dtype=self.dtype, param_dtype=self.param_dtype
        )
        block.use_running_average = self.use_running_average
        old = self._canonical()
        for name, variable in block._variables().items():  # noqa: SLF001 - its own
            # A bias that was not there goes where that of the norm is.
            variable[...] = _in_place_of(old.get(name, old.get("norm.bias", variable[...])), variable[...])
        return block


def _in_place_of(old: Array, new: Any) -> Array:
    """Return a new value in the dtype and on the devices of the old one."""
    # Bound to a device only where the old array was: else it could not meet arrays on several.
    return jax.device_put(np.asarray(new).astype(old.dtype), old.sharding if old.committed else None)
