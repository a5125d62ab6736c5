"""What every room does with arrays: products in full precision, wide dtypes, meshes, and where JAX computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nonlocal_core.arguments import check_floating
from nonlocal_core.errors import fail_type

__all__ = ["Spread", "check_dtype", "device_kind", "has_tensor_cores", "narrowed", "product", "wide_dtype"]

_SETTINGS: Any = jax.config  # whose options become attributes at run time
_Cut: Any = PartitionSpec  # which has no types


def product(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    """Return a product of arrays, summed up and returned in `dtype`."""
    if a.dtype == b.dtype == jnp.bfloat16 and dtype == jnp.float32:
        return _of_halves(equation, a, b)
    # By default GPUs and TPUs round float32 operands to fewer bits; whoever wants that has a setting for it.
    precision = None if _SETTINGS.jax_default_matmul_precision else lax.Precision.HIGHEST
    if a.dtype == b.dtype == jnp.float16 and precision:
        precision = lax.Precision.HIGH  # of use to gradients, whose range needs float32, but no more bits than these
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_halves(equation: str, a: Array, b: Array) -> Array:
    """Return a product of bfloat16 as float32, whose derivatives are products of bfloat16 again."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _of_halves_jvp(equation: str, primals: Any, tangents: Any) -> tuple[Array, Any]:
    """Give a product the derivative whose transposition rounds what it gets, instead of widening its operands."""
    a, b = primals
    parts = [
        jnp.einsum(equation, *pair).astype(jnp.float32)
        for pair, tangent in (((tangents[0], b), tangents[0]), ((a, tangents[1]), tangents[1]))
        if not isinstance(tangent, SymbolicZero)
    ]
    return _of_halves(equation, a, b), sum(parts[1:], parts[0])


_of_halves.defjvp(_of_halves_jvp, symbolic_zeros=True)


def check_dtype(name: str, value: Any) -> None:
    """Check that an argument names a floating-point dtype; None leaves it open."""
    try:
        found = None if value is None else jnp.dtype(value).name
    except TypeError:
        raise fail_type(name, "be a floating-point dtype or None", value) from None
    if found is not None:
        check_floating(name, found)


def narrowed(factors: Array, theta: Array, g: Array) -> Array:
    """Return weights or sums as an operand of the next product."""
    # They fit the range of bfloat16, which is that of float32; otherwise the other operand is widened to meet them.
    return factors.astype(g.dtype) if theta.dtype == g.dtype == jnp.bfloat16 else factors


def wide_dtype(*arrays: Array) -> Any:
    """Return the dtype of scores, weights and sums of these operands, at least float32."""
    # JAX's own function refuses operands of several dtypes where its user has asked for strict promotion.
    return np.result_type(*(np.promote_types(array.dtype, np.float32) for array in arrays))


def device_kind() -> str:
    """Return the kind of device that JAX computes on unless arrays are bound to another, which a trace cannot see."""
    return "cpu" if _device().platform == "cpu" else "gpu"


def has_tensor_cores() -> bool:
    """Return whether that device is a GPU of NVIDIA that multiplies bfloat16, from compute capability 8.0 on."""
    major = str(getattr(_device(), "compute_capability", "")).partition(".")[0]
    return major.isdigit() and int(major) >= 8  # noqa: PLR2004 - explained


def _device() -> jax.Device:
    default = _SETTINGS.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


class Spread:
    """How an array lies on a mesh whose axes are explicit: there every operation would need a word on its result.

    Args:
        array: what enters.
    """

    def __init__(self, array: Array) -> None:
        """Look at the type of the array."""
        sharding: Any = jax.typeof(array).sharding
        self._mesh, self._entries = sharding.mesh, tuple(sharding.spec)
        axes = zip(self._mesh.axis_names, self._mesh.axis_types, strict=True)
        self.axes = tuple(name for name, kind in axes if kind == AxisType.Explicit)

    def like(self, *axes: int | None) -> Any:
        """Return how an array is cut whose axes are cut as these axes of what entered, or not at all (None)."""
        if not self.axes:
            return _Cut()
        return _Cut(*(None if axis is None else self._entries[axis] for axis in axes))

    def call(self, function: Callable[..., Any], results: Any, *arguments: Any) -> Any:
        """Call a function of arrays, which the compiler divides over the explicit axes as it does over others.

        `results` says how what it returns is cut.
        """
        if not self.axes:
            return function(*arguments)
        shardings = jax.tree.map(
            lambda cut: NamedSharding(self._mesh, cut), results, is_leaf=lambda a: isinstance(a, PartitionSpec)
        )
        return jax.sharding.auto_axes(function, axes=self.axes, out_sharding=shardings)(*arguments)
