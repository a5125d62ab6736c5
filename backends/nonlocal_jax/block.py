"""The non-local block as a Flax module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from nonlocal_core.arguments import check_array
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.networks.block import CanonicalBlock
from nonlocal_core.planning import check_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.block import options_of
from nonlocal_core.spec.calls import check_arrays
from nonlocal_core.spec.form import Form
from nonlocal_core.spec.options import SpecOptions, check_options
from nonlocal_jax.arrays import Spread, check_dtype
from nonlocal_jax.forward import arrays_of, block_and_statistics, rows_of_weights
from nonlocal_jax.layers import Layers
from nonlocal_jax.norm import AxisName, running_statistics
from nonlocal_jax.parameters import canonical_of, in_place_of, names_of, new_layer, usable, variables_of
from nonlocal_jax.sharded import Mapped, check_cut, mapped_of

__all__ = ["NonLocalBlock"]


class NonLocalBlock(CanonicalBlock, nnx.Module):
    """Add to every position of its input what it gathers from all others (Wang et al., CVPR 2018, equation 6).

    One class serves sequences, images and videos: the rank comes from the input. As with `nnx.BatchNorm`, a new
    block is in training mode, in which batch normalisation uses the statistics of the input and moves the
    running ones; `eval()`, `train()` and `nnx.view` change that. `theta`, `phi`, `g` and `out` are `nnx.Linear` whose
    products are fused; what is put in the place of one, or of `norm`, is called, such as an `nnx.LoRA` around it.
    `norm` and `concat` are dicts of variables; running statistics are `nnx.BatchStat`, at least float32. A `pairwise`
    that is a module becomes the child `pairwise`.

    Args:
        channels: C, the channels of the input and of the output.
        rngs: the source of the random weights, its stream `params`.
        method: how the operation is computed: "auto", "pairwise" (the N x M matrix), or the method without it that
            serves the form: "streamed", "reassociated" or "sorted".
        dtype: the dtype of the computation; scores, weights and sums over keys are at least float32. None: that
            of the input.
        param_dtype: the dtype of the parameters.
        axis_name: the mapped axes, of `jax.shard_map` or `nnx.vmap`, whose batches batch normalisation takes for one;
            with `sharded_axis`, those that cut the positions.
        norm_axis_name: the mapped axes over which batch normalisation takes its statistics. None: `axis_name`.
        sharded_axis: the spatial axis of the input, from 0, along which `axis_name` cuts the positions: each device has
            a part of them, and the block shares their keys. None: what a device has is a whole, to which it attends
            alone.
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

    norm: Any
    axis_name: AxisName = None  # which pickles of version 0.1.0 have not, nor the following
    norm_axis_name: AxisName = None
    sharded_axis: int | None = None

    def __init__(
        self,
        channels: int,
        *,
        rngs: nnx.Rngs,
        method: str = "auto",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        axis_name: AxisName = None,
        norm_axis_name: AxisName = None,
        sharded_axis: int | None = None,
        **options: Unpack[SpecOptions],
    ) -> None:
        """Create the parameters; see the class for the arguments."""
        check_options(type(self), options)
        self.spec, self.method = NonLocalSpec(channels=channels, **options), method
        check_method(method, self.spec.pairwise)
        if not isinstance(rngs, nnx.Rngs):
            raise fail_type("rngs", "be a flax.nnx.Rngs", rngs)
        check_dtype("dtype", dtype)
        check_dtype("param_dtype", param_dtype)
        self.dtype, self.param_dtype = dtype, param_dtype
        check_cut(axis_name, sharded_axis)
        self.axis_name, self.norm_axis_name = _static(axis_name), _static(norm_axis_name)
        self.sharded_axis = sharded_axis
        self.use_running_average = False
        if isinstance(self.spec.pairwise, nnx.Module):
            # A spec is static, and what is static has no parameters: the module is a child, known by its place.
            self.pairwise, self.spec = self.spec.pairwise, self.spec.replace(pairwise=_child)
        for name in names_of(self.spec):
            setattr(self, name, new_layer(name, self.spec, rngs, dtype, param_dtype))

    @classmethod
    def from_spec(
        cls,
        spec: NonLocalSpec,
        *,
        rngs: nnx.Rngs,
        method: str = "auto",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        axis_name: AxisName = None,
        norm_axis_name: AxisName = None,
        sharded_axis: int | None = None,
    ) -> Self:
        """Return a new block that computes `spec`."""
        own: dict[str, Any] = {"method": method, "dtype": dtype, "param_dtype": param_dtype}
        own |= {"axis_name": axis_name, "norm_axis_name": norm_axis_name, "sharded_axis": sharded_axis}
        return cls(**options_of(spec), rngs=rngs, **own)

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
        check_array("x", x)
        names, training = (self.axis_name, self.norm_axis_name, self.sharded_axis), not self.use_running_average
        mapped = mapped_of(x, self.spec, *names, training=training)
        check_arrays(self.spec, x.shape, x, key_mask, training=training and self.sharded_axis is None)
        x, key_mask = arrays_of(self.spec, x, key_mask)
        spread, forward = Spread(x), partial(NonLocalBlock._forward, mapped=mapped)
        return self._divided(spread, forward, spread.like(*range(x.ndim)), x, key_mask)

    def _forward(self, x: Array, key_mask: Array | None, *, mapped: Mapped) -> Array:
        """Return z, and move the running statistics."""
        layers, params, form = self._layers()
        training = not self.use_running_average
        options: dict[str, Any] = {"method": self.method, "dtype": self.dtype, "mapped": mapped}
        z, found = block_and_statistics(x, layers, params, form, self.spec, key_mask, training, **options)
        for name, value in running_statistics(params, self.spec, found).items():
            self.norm[name.partition(".")[2]][...] = value
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
            ValueError: if a shape does not fit the spec, a position is out of range, or positions are cut.
        """
        if self.sharded_axis is not None:
            raise fail_value("sharded_axis", "be None for the attention, whose rows have all keys", self.sharded_axis)
        check_array("x", x)
        check_arrays(self.spec, x.shape, x, key_mask, training=False)
        x, key_mask = arrays_of(self.spec, x, key_mask)

        def rows(block: Self, x: Array, key_mask: Array | None) -> Array:
            layers, _, form = block._layers()
            return rows_of_weights(x, layers, form, block.spec, positions, key_mask, block.dtype)

        spread = Spread(x)
        return self._divided(spread, rows, spread.like(0, None, None), x, key_mask)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view, for `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _divided(self, spread: Spread, run: Callable[..., Array], result: Any, *arrays: Array | None) -> Array:
        """Return what a function of the block and arrays gives, on a mesh with explicit axes too."""
        if not spread.axes:
            return run(self, *arrays)
        graph, state = nnx.split(self)
        moving = nnx.Not(nnx.Param)

        def pure(state: Any, *arrays: Array | None) -> tuple[Array, Any]:
            block = nnx.merge(graph, state)
            return run(block, *arrays), nnx.state(block, moving)

        cuts = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, nnx.state(self, moving))
        z, moved = spread.call(pure, (result, cuts), state, *arrays)
        nnx.update(self, moved)
        return z

    def _modules(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names_of(self.spec)}

    def _layers(self) -> tuple[Layers, dict[str, Array], Form]:
        """Return what the block computes with: layers, the parameters of the others, and the form."""
        layers, params, form = usable(self._modules(), self.spec, self.dtype)
        pairwise = getattr(self, "pairwise", form.pairwise)
        return layers, params, dataclasses.replace(form, pairwise=pairwise)

    def _canonical(self) -> dict[str, Array]:
        return canonical_of(self._modules(), self.spec)

    def _assign(self, params: Mapping[str, np.ndarray[Any, Any]]) -> None:
        variables = variables_of(self._modules(), self.spec)
        values = {name: in_place_of(variables[name][...], value.T) for name, value in params.items()}
        for name, value in values.items():
            variables[name][...] = value

    def _like(self, spec: NonLocalSpec) -> Self:
        own: dict[str, Any] = {"method": self.method, "dtype": self.dtype, "param_dtype": self.param_dtype}
        own |= {name: getattr(self, name) for name in ("axis_name", "norm_axis_name", "sharded_axis")}
        block = self.from_spec(spec, rngs=nnx.Rngs(0), **own)
        block.use_running_average = self.use_running_average
        if hasattr(self, "pairwise"):
            block.pairwise = nnx.clone(self.pairwise)
        old = self._canonical()
        for name, variable in variables_of(block._modules(), spec).items():  # noqa: SLF001 - its own
            # A bias that was not there goes where that of the norm is.
            variable[...] = in_place_of(old.get(name, old.get("norm.bias", variable[...])).T, variable[...])
        return block

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickle; the projections of version 0.1.0 were dicts of weight (out, in) and bias."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, old in self._modules().items():
            if type(old) is nnx.Dict and name in self.spec.layers and name != "concat":
                layer: Any = new_layer(name, self.spec, nnx.Rngs(0), self.dtype, self.param_dtype)
                layer.kernel = nnx.Param(old["weight"][...].T)
                layer.bias = old.get("bias", layer.bias)
                setattr(self, name, layer)


def _static(axis_name: AxisName) -> AxisName:
    """Return names that can be compared and hashed."""
    return axis_name if axis_name is None or isinstance(axis_name, str) else tuple(axis_name)


def _child(*_: Array) -> Array:
    """Stand in a spec for the module of the block that has it."""
    message = "`pairwise` must be given anew. Got the spec of a block whose own `pairwise` is a module, which it keeps."
    raise TypeError(message)
