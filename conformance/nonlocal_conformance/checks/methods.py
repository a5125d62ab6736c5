"""The methods: each gives what the matrix gives, also where rearranged sums could lose it, and holds no matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, largest, require
from nonlocal_conformance.cases import Array, Case
from nonlocal_conformance.checks.derivatives import assert_gradients, reference_gradients
from nonlocal_conformance.checks.values import assert_output, form
from nonlocal_conformance.registry import Unsupported, check, methods_of
from nonlocal_core import NonLocalSpec
from nonlocal_core.planning import exact_method
from nonlocal_core.reference.operation import scores_of, weights_of
from nonlocal_core.spec.form import Form
from nonlocal_core.spec.options import is_softmax

Arrays = dict[str, Array]

WIDTH = 4
"""C' of the adversarial data, so small that their scores are exact in float32."""


@check()
def methods(driver: Any, case: Case, dtype: str) -> None:
    """Every method gives the output that the reference gives."""
    data = case.data(dtype)
    for method in methods_of(driver, case.spec):
        z, _ = driver.block(case.spec, data.params, data.x, data.key_mask, training=case.training, method=method)
        assert_output(f"z by method {method!r}", z, case, data, dtype)


@check("op", "op_vjp", cases=lambda case: case.is_differentiable and case.narrow, first=form)
def adversarial_data(driver: Any, case: Case, dtype: str) -> None:
    """Every method gives the reference's sums and gradients of ties, extremes, offsets and sorted keys."""
    for one in _adversaries(case.spec.pairwise):
        arrays = {name: a.astype(dtype) for name, a in one.arrays.items()}
        dy = arrays.pop("dy")
        for method in methods_of(driver, case.spec):
            results = driver.op_vjp(**arrays, dy=dy, **one.options, method=method)
            results = {"y": driver.op(**arrays, **one.options, method=method)} | results
            for name, expected in one.expected.items():
                what = f"{name if name == 'y' else f'd{name}'} of {one.name} by method {method!r}"
                assert_close(what, results[name], expected, dtype=dtype, scale=one.scales[name])


@check("vjp", cases=lambda case: case.is_plain and case.narrow and case.rank > 1, first=form)
def many_blocks(driver: Any, case: Case, dtype: str) -> None:
    """At sizes that no block of queries or keys divides, output and gradients are the reference's, by "auto" too."""
    large = dataclasses.replace(case, spatial=(37, 43, 1)[: case.rank], mask="some")
    if not hasattr(driver, "cases"):  # an implementation with cases of its own has widths of its own
        widths = {"channels": 40, "inner_channels": 24, "scale": "inner"}
        large = dataclasses.replace(large, options={**case.options, **widths})
    data, spec = large.data(dtype), large.spec
    wide = data.wide()
    output = nlc.nonlocal_block(wide.x, wide.params, spec, wide.key_mask)
    expected, terms = reference_gradients(large, wide)
    for method in dict.fromkeys(("auto", *methods_of(driver, spec))):
        z, _ = driver.block(spec, data.params, data.x, data.key_mask, method=method)
        assert_close(f"z of many positions by method {method!r}", z, output, dtype=dtype)
        actual = driver.vjp(spec, data.params, data.x, data.dz, data.key_mask, method=method)
        assert_gradients(actual, expected, dtype, terms=terms, where=f" of many positions by method {method!r}")


@dataclasses.dataclass(frozen=True)
class _Adversary:
    """Arguments on which rearranged sums go wrong first.

    Args:
        name: what is special about them.
        arrays: theta, phi, g, dy and those of the concatenation form, in float64.
        options: the other arguments of the operation.
        expected: y and the gradients, by the reference.
        scales: for each of these the largest sum of its absolute terms, to which rounding errors are relative.
    """

    name: str
    arrays: Arrays
    options: dict[str, Any]
    expected: Arrays
    scales: dict[str, float]


@functools.cache
def _adversaries(pairwise: Any) -> tuple[_Adversary, ...]:
    """Return the adversaries of a form; their numbers are few bits long, so that every dtype holds the scores."""
    offset = 2**14 if pairwise == "concatenation" else 32
    # Beyond some hundreds the scores of a softmax have no digits left for its gradients: kernels that compute
    # weights anew start from the logarithm of their sum, rounded.
    factor = 4 if is_softmax(pairwise, None) else 64
    shapes = {"one key": (2, 257, 1), "one query": (2, 1, 193), "many positions": (1, 2305, 2305)}
    changes: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
        "ties": lambda theta, phi: (np.sign(theta), np.sign(phi)),
        "equal scores": lambda theta, phi: (0 * theta + 1, 0 * phi + 1),
        "huge scores": lambda theta, phi: (factor * theta, factor * phi),
        "tiny scores": lambda theta, phi: (2.0**-40 * theta, 2.0**-40 * phi),
        "opposite offsets": lambda theta, phi: (_moved(theta, offset), _moved(phi, -offset)),
        "one dominant key": lambda theta, phi: (theta, np.where(np.arange(phi.shape[1])[:, None] == 1, 32 * phi, phi)),
        "rising keys": lambda theta, phi: (np.sort(theta, axis=1), np.sort(phi, axis=1)),
        "falling keys": lambda theta, phi: (-np.sort(theta, axis=1), -np.sort(phi, axis=1)),
    }
    biases = {"no active key": -1024.0, "every key active": 1024.0} if pairwise == "concatenation" else {}
    found = []
    for number, name in enumerate((*changes, "masked keys", *shapes, *biases)):
        rng = np.random.default_rng(number)
        batch, queries, keys = shapes.get(name, (2, 257, 193))
        theta, phi = (rng.integers(-64, 65, (batch, size, WIDTH)) / 16 for size in (queries, keys))
        theta, phi = changes[name](theta, phi) if name in changes else (theta, phi)
        g, dy = (rng.integers(-64, 65, (batch, size, 3)) / 32 for size in (keys, queries))
        arrays: dict[str, Any] = {"theta": theta, "phi": phi, "g": g}
        options: dict[str, Any] = {"pairwise": pairwise, "scale": -0.5}
        if pairwise == "concatenation":
            arrays["concat_weight"] = np.array([1.0, 0.5, 0.25, 2.0] * 2)
            arrays["concat_bias"] = np.asarray(biases.get(name, 0.125))
        if name == "masked keys":
            options["key_mask"] = rng.random((batch, keys)) < 0.4  # noqa: PLR2004 - some, not most
            options["key_mask"][-1] = False
        expected = {"y": nlc.nonlocal_op(**arrays, **options), **nlc.nonlocal_op_vjp(**arrays, dy=dy, **options)}
        arrays["dy"] = dy
        scales = {name: largest(a) for name, a in _terms(arrays, options).items()}
        found.append(_Adversary(name, arrays, options, expected, scales))
    return tuple(found)


def _moved(a: Array, offset: int) -> Array:
    """Return `a` with one channel at an offset."""
    return np.concatenate([a[..., :1] + offset, a[..., 1:]], axis=-1)


def _terms(arrays: Arrays, options: dict[str, Any]) -> Arrays:
    """Return the sums of the absolute terms of y and of the gradients."""
    pairwise, scale = options["pairwise"], abs(options["scale"])
    form = Form(pairwise, is_softmax(pairwise, None), scale, arrays.get("concat_weight"), arrays.get("concat_bias"))
    valid = options.get("key_mask", np.ones(arrays["phi"].shape[:2], bool))[:, None, :]
    theta, phi, g, dy = (np.abs(arrays[name]) for name in ("theta", "phi", "g", "dy"))
    weights = np.abs(weights_of(arrays["theta"], arrays["phi"], form, valid))
    spread = dy @ g.mT
    if form.softmax:
        spread = weights * (spread + (weights * spread).sum(axis=-1, keepdims=True))
    else:
        spread = np.where(valid, spread, 0.0) / np.maximum(valid.sum(axis=-1, keepdims=True), 1)
    spread = scale * spread
    terms = {"y": weights @ g, "g": weights.mT @ dy}
    if pairwise != "concatenation":
        return terms | {"theta": spread @ phi, "phi": spread.mT @ theta}
    spread = np.where(scores_of(arrays["theta"], arrays["phi"], form) > 0, spread, 0.0)
    da, db = spread.sum(axis=2), spread.sum(axis=1)
    of_theta, of_phi = np.split(np.abs(arrays["concat_weight"]), 2)
    weight = np.concatenate([np.einsum("bn,bnc->c", da, theta), np.einsum("bm,bmc->c", db, phi)])
    terms |= {"theta": da[..., None] * of_theta, "phi": db[..., None] * of_phi, "concat_weight": weight}
    return terms | {"concat_bias": da.sum()}


@check(
    "large",
    "op",
    cases=lambda case: case.is_differentiable and case.spec.pairwise != "gaussian",
    first=form,
    every_dtype=False,
)
def many_positions(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it needs float32
    """By the method without the matrix, 65,536 queries and keys give the reference's rows."""
    pairwise: Any = case.spec.pairwise
    method, positions, width = exact_method(pairwise), 65536, 8
    rng = np.random.default_rng(0)
    names = ("theta", "phi", "g")
    arrays = {name: rng.normal(0.5, size=(1, positions, width)).astype(np.float32) for name in names}
    if pairwise == "concatenation":
        arrays["concat_weight"] = rng.normal(size=2 * width).astype(np.float32)
    options: dict[str, Any] = {"pairwise": pairwise, "scale": 0.5}
    y = driver.op(**arrays, **options, method=method)
    rows = rng.choice(positions, 64, replace=False)
    wide: dict[str, Any] = {name: a.astype(np.float64) for name, a in arrays.items()}
    expected = nlc.nonlocal_op(**{**wide, "theta": wide["theta"][:, rows]}, **options)
    assert_close(f"y of some rows by method {method!r}", y[:, rows], expected, dtype="float32")


@check("peak_memory", cases=lambda case: case.is_plain and case.rank == 1, first=form, every_dtype=False)
def memory(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it needs float32
    """Neither output nor gradients need the memory of the matrix of weights, with a mask or without."""
    spec, positions = NonLocalSpec(**{**case.options, "channels": 16, "inner_channels": 8}), 3584
    rng = np.random.default_rng(0)
    x, dz = (rng.normal(size=(1, positions, 16)).astype(np.float32) for _ in range(2))
    params = {name: a.astype(np.float32) for name, a in nlc.init_params(spec, rng).items()}
    mask, method = rng.random((1, positions)) < 0.6, exact_method(spec.pairwise)  # noqa: PLR2004 - some, not most
    calls: dict[str, Callable[[], Any]] = {"output": lambda: driver.block(spec, params, x)}
    if "vjp" in driver.capabilities:
        calls["gradients"] = lambda: driver.vjp(spec, params, x, dz)
        calls["gradients beside a mask"] = lambda: driver.vjp(spec, params, x, dz, mask)
    if method in driver.methods:
        calls[f"output by method {method!r}"] = lambda: driver.block(spec, params, x, mask, method=method)
    matrix = 4 * positions**2
    for name, call in calls.items():
        call()  # what is compiled or loaded once is not the call's
        _, peak = driver.peak_memory(call)
        if peak is None:
            message = "this system does not tell the peak memory of a call"
            raise Unsupported(message)
        require(peak < matrix / 2, f"the {name} needed {peak / 2**20:.0f} MiB, the matrix has {matrix / 2**20:.0f}")
