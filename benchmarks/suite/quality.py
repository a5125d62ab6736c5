"""How exact the result is, and how much of what the machine can do is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from measuring.arrays import input_of, params_of, positions_of
from measuring.case import BACKENDS, DEVICES, DTYPES, FORMS, GEOMETRIES, METHODS, Case
from measuring.subject import median_seconds, subject
from nonlocal_core import NonLocalSpec, attention, cost

__all__ = ["Quality"]

Array = np.ndarray[Any, Any]

_SIZES = {"cpu": 2048, "cuda": 8192}
"""The size of the square matrices whose product stands for what a device can do."""


class Quality:
    """The error of the block in evaluation, and the time of a training step in products of matrices."""

    params = (BACKENDS, DEVICES, FORMS, METHODS, tuple(GEOMETRIES), DTYPES)
    param_names = ("backend", "device", "pairwise", "method", "geometry", "dtype")

    @staticmethod
    def case(backend: str, device: str, pairwise: str, method: str, geometry: str, dtype: str) -> Case:
        """Return what the parameters mean, in evaluation."""
        return Case(backend, device, pairwise, method, *GEOMETRIES[geometry], dtype)

    def track_error(self, *params: str) -> float:
        """The largest error at 64 positions, of float64 reference, in eps of the largest value."""
        one = subject("quality.Quality", params, self.case(*params), "forward")
        z = one.library.to_numpy(one.run()).reshape(-1, one.case.channels)
        chosen = positions_of(one.case.positions)
        spec = one.library.spec_of(one.case)
        expected = _reference(one.case, spec, chosen)
        eps = 2.0**-7 if one.case.dtype == "bfloat16" else float(np.finfo(np.float32).eps)
        return float(np.abs(z[chosen] - expected).max() / (eps * np.abs(expected).max()))

    def track_cost(self, *params: str) -> float:
        """The time of a training step over that in which a product of matrices does as many operations."""
        case = dataclasses.replace(self.case(*params), training=True)
        one = subject("quality.Quality", params, case, "training")
        flops = cost(case.spec, case.shape, case.dtype, training=True).methods[_method(case)].flops
        size = _SIZES[case.device]
        product = one.library.product(case, size)
        product()
        return one.seconds() / (flops / (2 * size**3) * median_seconds(product, 1.0))

    track_error.unit = "eps"  # type: ignore[attr-defined]
    track_cost.unit = "times"  # type: ignore[attr-defined]


def _method(case: Case) -> str:
    """Return the method whose operations are counted, by a name without which asv would drop earlier results."""
    return case.counted


def _reference(case: Case, spec: NonLocalSpec, positions: list[int]) -> Array:
    """Return rows of z in float64: the reference's weights for these positions, times all values."""
    x = input_of(case.shape).astype(np.float64)
    params = {name: array.astype(np.float64) for name, array in params_of(spec).items()}
    flat = x.reshape(-1, case.channels)
    g = flat @ params["g.weight"].T + params.get("g.bias", 0.0)
    y = attention(x, params, spec, positions)[0] @ g
    r = y @ params["out.weight"].T + params.get("out.bias", 0.0)
    deviation = np.sqrt(params["norm.variance"] + spec.norm_epsilon)
    r = (r - params["norm.mean"]) / deviation * params["norm.weight"] + params["norm.bias"]
    z: Array = flat[positions] + r
    return z
