"""The block inside a map over devices: each keeps its positions, and they share keys, products and statistics."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.arguments import check_array, check_int, dtype_name, known_sizes
from nonlocal_core.errors import fail_value
from nonlocal_core.planning import sends_products
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_spec
from nonlocal_core.spec.cuts import check_pieces, inner_axis
from nonlocal_core.spec.form import Form
from nonlocal_jax.arrays import wide_dtype
from nonlocal_jax.methods.pairwise import summands
from nonlocal_jax.methods.reassociated import by_products
from nonlocal_jax.norm import AxisName
from nonlocal_jax.op import aggregate

__all__ = ["Mapped", "check_cut", "mapped_of"]

_psum: Any = lax.psum  # which has no types


@dataclasses.dataclass(frozen=True)
class Mapped:
    """What the axes of a map, such as `jax.shard_map`, are for a block.

    Args:
        norm_axes: those over which batch normalisation takes its statistics.
        key_axes: those along which the keys of one set are apart.
        inner: the axis of a set that they cut.
        key_sizes: the sizes of the grid of all keys of a set; none where each device has all of its own.
    """

    norm_axes: AxisName
    key_axes: AxisName = None
    inner: int = 0
    key_sizes: tuple[int, ...] = ()

    def aggregate(self, theta: Array, phi: Array, g: Array, form: Form, valid: Array | None, method: str) -> Array:
        """Compute the operation for the queries of this device and the keys of all."""
        if not self.key_sizes:
            return aggregate(theta, phi, g, form, valid, method)
        dtype, sizes = theta.dtype, known_sizes((math.prod(self.key_sizes), phi.shape[2], g.shape[2]))
        if form.pairwise == "dot_product" and method != "pairwise" and sends_products(*sizes):
            if valid is not None:
                phi, g = (jnp.where(valid[..., None], a, 0) for a in (phi, g))
            return by_products(theta, phi, g, form, valid, partial(_psum, axis_name=self.key_axes)).astype(dtype)
        if form.pairwise == "concatenation":  # of a key one number is asked
            theta, phi = (a[..., None] for a in summands(theta, phi, form, wide_dtype(theta, phi)))
            form = dataclasses.replace(form, concat_weight=jnp.ones(2, theta.dtype), concat_bias=None)
        phi, g = self._gather(phi), self._gather(g)
        valid = None if valid is None else self._gather(valid[..., None])[..., 0]
        return aggregate(theta, phi, g, form, valid, method).astype(dtype)

    def _gather(self, a: Array) -> Array:
        """Return what all devices hold of the keys of a set, `(B', M here, C)` -> `(B', M, C)`."""
        here = (*self.key_sizes[: self.inner], -1, *self.key_sizes[self.inner + 1 :])
        grid = a.reshape(a.shape[0], *here, a.shape[-1])  # on which keys are cut as positions are
        every = lax.all_gather(grid, self.key_axes, axis=1 + self.inner, tiled=True)
        return every.reshape(a.shape[0], math.prod(self.key_sizes), a.shape[-1])


def check_cut(axis_name: AxisName, sharded_axis: Any) -> None:
    """Check that a cut axis has the name of the mapped axis that cuts it."""
    if sharded_axis is None:
        return
    check_int("sharded_axis", sharded_axis, "be a spatial axis of `x`, counted from 0, or None", least=0)
    if axis_name is None:
        raise fail_value("axis_name", "name the mapped axis that cuts the positions along `sharded_axis`", None)


def mapped_of(
    x: Array, spec: NonLocalSpec, axis_name: AxisName, norm_axis_name: AxisName, sharded_axis: Any, *, training: bool
) -> Mapped:
    """Check how an input is cut, by the sizes of the whole, and return what the mapped axes are for the block."""
    norm_axes = axis_name if norm_axis_name is None else norm_axis_name
    check_cut(axis_name, sharded_axis)
    if sharded_axis is None:
        return Mapped(norm_axes)
    check_array("x", x)
    check_spec(spec)
    devices, rank, here = _psum(1, axis_name), len(x.shape) - 2, x.shape[1:-1]
    whole = tuple(size * devices if axis == sharded_axis else size for axis, size in enumerate(here))
    spec.check_input(known_sizes((*x.shape[:1], *whole, *x.shape[-1:])), dtype=dtype_name(x), training=training)
    if sharded_axis >= rank:
        raise fail_value("sharded_axis", f"be one of the {rank} spatial axes of `x`", sharded_axis)
    if isinstance(here[sharded_axis], int):
        check_pieces(spec, rank, sharded_axis, [here[sharded_axis]] * devices)
    inner = inner_axis(spec, rank, sharded_axis)
    return Mapped(norm_axes) if inner is None else Mapped(norm_axes, axis_name, inner, spec.sets(whole).key_sizes)
