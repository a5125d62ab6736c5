"""Blocks whose input is cut over several devices, each of which holds some positions or samples."""

from __future__ import annotations

from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_names, largest, require
from nonlocal_conformance.cases import Case
from nonlocal_conformance.checks.derivatives import assert_gradients, reference_gradients
from nonlocal_conformance.checks.values import assert_output, form
from nonlocal_conformance.registry import check
from nonlocal_core import NonLocalSpec
from nonlocal_core.planning import exact_method
from nonlocal_core.spec.parameters import STATISTICS

DEVICES = 4


@check("sharded")
def sharded(driver: Any, case: Case, dtype: str) -> None:
    """What a cut input gives is what the whole gives: output, gradients and running statistics."""
    data, spec = case.data(dtype), case.spec
    axis, devices = case.cut or (0, 1)
    arguments = spec, data.params, data.x, data.dz, data.key_mask
    z, after, dx, dparams = driver.sharded(*arguments, axis=axis, devices=devices, training=case.training)
    assert_output("z", z, case, data, dtype)
    wide = data.wide()
    expected, terms = reference_gradients(case, wide)
    assert_gradients((dx, dparams), expected, dtype, terms=terms)
    moved = {name: a for name, a in wide.params.items() if name in STATISTICS}
    if case.trains_norm:
        moved = nlc.updated_statistics(wide.x, wide.params, spec, wide.key_mask, unbiased=driver.unbiased)
    assert_names("the running statistics", after, moved)
    for name, value in moved.items():
        assert_close(f"{name} after the call", after[name], value, dtype=dtype)


@check(
    "sharded",
    "sharded_hvp",
    "hvp",
    cases=lambda case: case.is_pooled and case.mask is not None and case.training and case.is_one_set,
    first=form,
    every_dtype=False,
)
def sharded_second_derivatives(driver: Any, case: Case, dtype: str) -> None:
    """The second derivatives of a cut input are those that the implementation gives on one device."""
    data, spec, rng = case.data(dtype), case.spec, np.random.default_rng(0)
    axis, devices = case.cut or (0, 1)
    vx = np.asarray(rng.normal(size=data.x.shape), dtype)
    trained = {name: a for name, a in data.params.items() if name not in STATISTICS}
    vparams = {name: np.asarray(rng.normal(size=a.shape), dtype) for name, a in trained.items()}
    arguments = spec, data.params, data.x, data.dz, vx, vparams, data.key_mask
    dx, dparams = driver.sharded_hvp(*arguments, axis=axis, devices=devices, training=case.training)
    expected, others = driver.hvp(*arguments, training=case.training)
    assert_names("the second derivatives of the parameters", dparams, others)
    scale = largest(expected, *others.values())
    assert_close("the second derivatives of x", dx, expected, dtype=dtype, scale=scale)
    for name, a in others.items():
        assert_close(f"those of {name}", dparams[name], a, dtype=dtype, scale=scale)


@check("sharded", "traffic", first=form, every_dtype=False)
def traffic(driver: Any, case: Case, dtype: str) -> None:
    """No device receives more than the keys of the others, or the sums of their products where those are fewer."""
    calls: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
        ({}, (64,)),
        ({"subsample": 16}, (64,)),
        ({"axes": "space"}, (8, 2, 2)),
    )
    for options, spatial in calls:
        spec = NonLocalSpec(channels=7, inner_channels=5, pairwise=case.spec.pairwise, **options)
        shape, rng = (1, *spatial, 7), np.random.default_rng(0)
        params = {name: a.astype(dtype) for name, a in nlc.init_params(spec, rng).items()}
        cost = nlc.cost(spec, shape, dtype, devices=DEVICES).methods[f"{exact_method(spec.pairwise)}"]
        allowed = cost.bytes_received / np.dtype(dtype).itemsize
        found = driver.traffic(spec, params, rng.normal(size=shape).astype(dtype), axis=1, devices=DEVICES)
        for direction, received in zip(("forward", "backward"), found, strict=True):
            message = (
                f"{direction}, a device received {received:,.0f} numbers with {options}, allowed are {allowed:,.0f}"
            )
            require(received <= allowed, message)


@check("sharded", "sharded_memory", first=form, every_dtype=False)
def sharded_memory(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it needs float32
    """What more positions take of a device is its share, and beside that a few times what it receives of them."""
    spec, rng = NonLocalSpec(channels=64, pairwise=case.spec.pairwise), np.random.default_rng(0)
    params = {name: a.astype(np.float32) for name, a in nlc.init_params(spec, rng).items()}
    found = []
    for size in (2048, 4096):
        shape = (1, size, 64)
        x, dz = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        alone, cut = (driver.sharded_memory(spec, params, x, dz, axis=1, devices=devices) for devices in (1, DEVICES))
        received = nlc.cost(spec, shape, devices=DEVICES).methods[f"{exact_method(spec.pairwise)}"].bytes_received
        found.append((alone, cut, received * DEVICES / (DEVICES - 1)))
    # The difference leaves out what is as large for every input, such as a chunk of weights.
    alone, cut, received = np.subtract(found[1], found[0])
    # What is received, as a method puts it in order and sums it up, and the gradients of that.
    allowed = 1.1 * alone / DEVICES + 8 * received
    message = f"{cut:,} bytes more for one of {DEVICES} devices, {alone:,} for one alone; allowed are {allowed:,.0f}"
    require(cut <= allowed, message)


@check("sharded", first=lambda _: None, every_dtype=False)
def wrong_cuts(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - it has inputs of its own
    """A cut through a pooling window or a group of frames is refused by a ValueError that names the input."""
    wrong: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
        ({"subsample": 2}, (12,)),
        ({"group_size": 2}, (12, 2, 2)),
    )
    for options, spatial in wrong:
        spec, rng = NonLocalSpec(channels=7, **options), np.random.default_rng(0)
        params = {name: a.astype(dtype) for name, a in nlc.init_params(spec, rng).items()}
        x = rng.normal(size=(1, *spatial, 7)).astype(dtype)
        try:
            driver.sharded(spec, params, x, x, axis=1, devices=DEVICES)
        except ValueError as error:
            require("`x`" in f"{error}", f"the error for a cut through {options} must name `x`, and says: {error}")
        else:
            message = f"a cut through {options} must be refused"
            raise AssertionError(message)
