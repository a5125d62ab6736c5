"""Compilation, sizes, layouts and mixed precision."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_same, assert_within, require
from nonlocal_conformance.bounds import UNITS, output_bound
from nonlocal_conformance.cases import Array, Case
from nonlocal_conformance.checks.values import assert_output, form
from nonlocal_conformance.registry import check, methods_of
from nonlocal_core import NonLocalSpec

FLOAT16_MAX = 65504.0


def _graph(case: Case) -> str:
    """Return what a graph has to hold."""
    if case.trains_norm:
        return "training"
    if not case.is_one_set:
        return "sets"
    return str(case.spec.pairwise) if case.mask is None else "mask"


@check("compiled", cases=lambda case: case.is_pooled and case.is_differentiable, first=_graph, every_dtype=False)
def compiled(driver: Any, case: Case, dtype: str) -> None:
    """The compiled block gives the reference's output, by every method."""
    data = case.data(dtype)
    for method in methods_of(driver, case.spec):
        z = driver.compiled(case.spec, data.params, data.x, data.key_mask, training=case.training, method=method)
        assert_output(f"z of the block compiled with method {method!r}", z, case, data, dtype)


@check("steps", cases=lambda case: case.mask is None and not case.training, every_dtype=False, by_reference=True)
def sizes(driver: Any, case: Case, dtype: str) -> None:
    """One block serves inputs of several sizes, in any order."""
    data, spec = case.data(dtype), case.spec
    rng = np.random.default_rng(zlib.crc32(b"sizes " + case.name.encode()))
    larger = tuple(size * 2 for size in case.spatial)
    shapes = [(2, *case.spatial), (1, *larger), (3, *larger[::-1]), (2, *case.spatial)]
    shapes = [shape for shape in shapes if spec.group_size is None or shape[1] % spec.group_size == 0]
    inputs = [rng.normal(size=(*shape, spec.channels)).astype(dtype) for shape in shapes]
    for shape, x, (z, _) in zip(shapes, inputs, driver.steps(spec, data.params, inputs), strict=True):
        assert_output(f"z of shape {shape}", z, case, dataclasses.replace(data, x=x), dtype)


@check("layouts", cases=lambda case: not case.training and case.batch > 1)
def layouts(driver: Any, case: Case, dtype: str) -> None:
    """The memory layout of the input or the mask changes no value and no gradient, and a regular one is kept."""
    data = case.data(dtype)
    expected = None
    if case.is_differentiable:
        wide = data.wide()
        expected = nlc.nonlocal_block_vjp(wide.x, wide.params, case.spec, wide.dz, wide.key_mask)[0]
    for name, (z, dx, kept) in driver.layouts(case.spec, data.params, data.x, data.dz, data.key_mask).items():
        assert_output(f"z of {name}", z, case, data, dtype)
        if expected is not None:
            assert_close(f"dx of {name}", dx, expected, dtype=dtype)
        require(kept, f"z of {name} must have the layout of its input")
    assert_same("x after the calls", data.x, case.data(dtype).x)


def _is_near_its_bound(case: Case) -> bool:
    """Return whether roundings add up, not cancel: beside the narrow cases those of few keys and no norm."""
    return case.narrow or (case.mask == "some" and case.spec.norm is None)


@check(
    "mixed",
    cases=lambda case: _is_near_its_bound(case) and not case.training and case.is_differentiable,
    every_dtype=False,
)
def mixed_precision(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """With half-precision operands the error stays below its first-order bound, and z keeps the dtype of x."""
    data = case.data("float32")
    wide = data.wide()
    expected = nlc.nonlocal_block(wide.x, wide.params, case.spec, wide.key_mask)
    bounds = {compute: output_bound(case, wide, compute) for compute in driver.mixed_dtypes}
    for name, compute, z in _mixed(driver, case.spec, data.params, data.x, data.key_mask):
        assert_within(name, z, expected, bounds[compute])


@check("mixed", cases=lambda case: case.is_plain, first=form, every_dtype=False)
def large_scores(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """Scores beyond the largest float16 give finite results: they leave their product in float32."""
    data, factor = case.data("float32"), 1e-4
    # An implementation with cases of its own has a scale of its own: what keeps y small is then in g.
    is_fixed = hasattr(driver, "cases")
    spec = case.spec if is_fixed else case.spec.replace(scale=factor)
    wide = NonLocalSpec.replace(spec, channels=512, inner_channels=512)
    rng = np.random.default_rng(0)
    x = (24.0 * rng.normal(size=(*data.x.shape[:-1], 512))).astype(np.float32)
    eye = np.eye(512, dtype=np.float32)
    params = _plain_params(wide, eye)
    if "concat.weight" in params:
        params["concat.weight"] = np.full(1024, 100.0, np.float32)
    params["out.weight"] = eye * np.float32(1e-3)
    if is_fixed:
        params["g.weight"] = eye * np.float32(factor)
    double = {name: a.astype(np.float64) for name, a in params.items()}
    scores = np.einsum("nc,mc->nm", *[x[0].reshape(-1, 512).astype(np.float64)] * 2)
    require(scores.max() > FLOAT16_MAX, "the data must exceed the range of float16")
    expected = nlc.nonlocal_block(x.astype(np.float64), double, wide)
    for name, compute, z in _mixed(driver, wide, params, x):
        require(bool(np.isfinite(z).all()), f"{name} must be finite where a score exceeds {FLOAT16_MAX:.0f}")
        worst = float(np.max(np.abs(z - expected)))
        allowed = 64 * UNITS[compute] * float(np.max(np.abs(expected)))
        require(worst <= allowed, f"{name} differs by {worst:.3g}, allowed are {allowed:.3g}")


@check("mixed", cases=lambda case: case.spec.is_softmax and case.is_plain, first=form, every_dtype=False)
def score_digits(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """A part that all scores of a query share, however large, changes no weight: scores keep their digits."""
    data, spec = case.data("float32"), case.spec.replace(channels=16, inner_channels=16)
    x = np.random.default_rng(0).integers(-1, 2, (*data.x.shape[:-1], 16)).astype(np.float32)
    x[..., :4] = 32  # every operand is an integer that half precision holds
    eye = np.eye(16, dtype=np.float32)
    params = _plain_params(spec, eye)
    double = {name: a.astype(np.float64) for name, a in params.items()}
    expected = nlc.nonlocal_block(x.astype(np.float64), double, spec)
    for name, compute, z in _mixed(driver, spec, params, x):
        bound = 8 * UNITS[compute] * np.abs(x).max(axis=(0, *range(1, x.ndim - 1)))
        assert_within(name, z, expected, bound)


@check(
    "mixed",
    cases=lambda case: case.is_plain and case.rank == 1 and case.spec.pairwise == "dot_product",
    first=form,
    every_dtype=False,
)
def long_sums(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """A sum over many keys of one sign grows to its end: it is at least float32."""
    case = dataclasses.replace(case, spatial=(2048,), batch=1)
    data = case.data("float32")
    params = {name: np.abs(a) for name, a in data.params.items()}
    data = dataclasses.replace(data, x=np.abs(data.x), params=params)
    wide = data.wide()
    expected = nlc.nonlocal_block(wide.x, wide.params, case.spec)
    for name, compute, z in _mixed(driver, case.spec, params, data.x):
        assert_within(name, z, expected, output_bound(case, wide, compute))


@check(
    "mixed",
    cases=lambda case: case.is_differentiable and case.spec.residual and case.mask is None and not case.training,
    first=lambda case: (form(case), case.spec.norm),
    every_dtype=False,
)
def mixed_identity(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it names its own dtypes
    """With half-precision operands, a branch that is 0 leaves the input as it is, bit for bit."""
    data = case.data("float32")
    last = "norm" if case.spec.norm else "out"
    params = {name: 0 * a if name in {f"{last}.weight", f"{last}.bias"} else a for name, a in data.params.items()}
    for name, _, z in _mixed(driver, case.spec, params, data.x):
        assert_same(name, z, data.x)


def _mixed(
    driver: Any, spec: NonLocalSpec, params: dict[str, Array], x: Array, key_mask: Array | None = None
) -> Iterator[tuple[str, str, Array]]:
    """Give a name, the compute dtype and z, for each half precision of a driver and each of its methods."""
    for compute, method in itertools.product(driver.mixed_dtypes, methods_of(driver, spec)):
        name = f"z in {compute}" if method == "auto" else f"z in {compute} by method {method!r}"
        yield name, compute, driver.mixed(spec, params, x, compute, key_mask, method=method)


def _plain_params(spec: NonLocalSpec, eye: Array) -> dict[str, Array]:
    """Return parameters with which every layer, and the norm, is the identity."""
    params = {
        name: eye if len(shape) == 2 else np.zeros(shape, np.float32)  # noqa: PLR2004 - a matrix
        for name, shape in nlc.param_shapes(spec).items()
    }
    ones = np.ones(len(eye), np.float32)
    return params | {name: ones for name in ("norm.weight", "norm.variance") if name in params}
