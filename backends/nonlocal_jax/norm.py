"""Normalisation: the moments of what counts, the running statistics, and both over several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from nonlocal_core.spec import NonLocalSpec
from nonlocal_jax.arrays import wide_dtype

__all__ = ["AxisName", "Params", "normalized", "running_statistics"]

Params = Mapping[str, Any]
AxisName = str | Sequence[str] | None


def normalized(
    a: Array, params: Params, spec: NonLocalSpec, key_mask: Array | None, training: bool, axis_name: AxisName
) -> tuple[Array, dict[str, Array]]:
    """Return norm(a) of `(B, N, C)`, and the mean and the biased variance of each channel where they were taken.

    With a mask they are those of the positions that it names, whose number is then found beside them as "count".
    """
    a = a.astype(wide_dtype(a))
    norm = {name: jnp.asarray(value, a.dtype) for name, value in params.items() if name.startswith("norm.")}
    found: dict[str, Array] = {}
    if spec.norm == "batch":
        mean, variance = (lax.stop_gradient(norm[f"norm.{name}"]) for name in ("mean", "variance"))
        if training:
            own, count = _moments(a, key_mask, axis_name)
            if count is not None:
                own = [jnp.where(count > 0, *pair) for pair in zip(own, (mean, variance), strict=True)]
                found["count"] = count
            mean, variance = own
            found |= {"norm.mean": mean, "norm.variance": variance}
        a = (a - _row(mean)) * _row(lax.rsqrt(variance + spec.norm_epsilon))
    return a * _row(norm["norm.weight"]) + _row(norm["norm.bias"]), found


def _moments(a: Array, key_mask: Array | None, axis_name: AxisName) -> tuple[list[Array], Array | None]:
    """Return the mean and the biased variance of each channel of `(B, N, C)`, and how many positions a mask names."""
    mask, count = None, None
    if key_mask is not None:
        mask = key_mask.reshape(*a.shape[:2], 1)
        count = _over(lax.psum, jnp.sum(mask, axis=(0, 1), dtype=a.dtype), axis_name)

    def mean_of(values: Array) -> Array:
        if count is None:
            return _over(lax.pmean, jnp.mean(values, axis=(0, 1)), axis_name)
        return _over(lax.psum, jnp.sum(values, axis=(0, 1)), axis_name) / jnp.maximum(count, 1)

    def counted(values: Array) -> Array:
        return values if mask is None else jnp.where(mask, values, 0)

    # The rounding errors of one long sum are felt after some steps of training; what it leaves over is small,
    # and its sum exact enough. Any shift gives the same moments, so the shift needs no gradient.
    shift = lax.stop_gradient(mean_of(counted(a)))
    a = counted(a - _row(shift))
    rest = mean_of(a)
    return [shift + rest, mean_of(jnp.square(a)) - jnp.square(rest)], count


def _over(reduce: Any, values: Array, axis_name: AxisName) -> Array:
    """Return values reduced over mapped axes, if there are any."""
    return values if axis_name is None else reduce(values, axis_name)


def _row(channels: Array) -> Array:
    """Return a number per channel as `(1, 1, C)`: its user may have forbidden JAX to add axes by itself."""
    return channels[None, None]


def running_statistics(params: Params, spec: NonLocalSpec, found: Mapping[str, Array]) -> dict[str, Array]:
    """Return the running statistics moved towards the ones just found; they stay where no position counted."""
    share: Any = spec.norm_momentum
    if "count" in found:
        share = jnp.where(found["count"] > 0, share, 0.0)
    moved = {}
    for name, new in found.items():
        if name != "count":
            old = jnp.asarray(params[name])
            moved[name] = ((1 - share) * old.astype(new.dtype) + share * lax.stop_gradient(new)).astype(old.dtype)
    return moved
