"""What every room does with arrays: products in full precision, the dtype of an operand, and where JAX computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.arguments import check_floating
from nonlocal_core.errors import fail_type

__all__ = ["check_dtype", "device_kind", "narrowed", "product"]

_SETTINGS: Any = jax.config  # whose options become attributes at run time


def product(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    """Return a product of arrays, summed up and returned in `dtype`."""
    # By default GPUs and TPUs round float32 operands to fewer bits; whoever wants that has a setting for it.
    precision = None if _SETTINGS.jax_default_matmul_precision else lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)


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


def device_kind() -> str:
    """Return the kind of device that JAX computes on unless arrays are bound to another, which a trace cannot see."""
    default = _SETTINGS.jax_default_device
    platform = jax.default_backend() if default is None else getattr(default, "platform", default)
    return "cpu" if platform == "cpu" else "gpu"
