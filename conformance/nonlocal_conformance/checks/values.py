"""What a block computes: its output, its weights, and what must not influence them."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_same, largest, require
from nonlocal_conformance.cases import Array, Case, Data
from nonlocal_conformance.registry import check
from nonlocal_core.reference.block import branch, statistics_of


def form(case: Case) -> Any:
    """Return the form of a case, for checks that need one case of each."""
    return case.spec.pairwise


def assert_output(name: str, z: Any, case: Case, data: Data, dtype: str) -> None:
    """Assert that an output equals the reference's.

    Batch normalisation in training subtracts a mean that can be far larger than what is left, so the tolerance
    is relative to the values before that, in units of their standard deviation, if those are the larger.
    """
    wide, spec = data.wide(), case.spec
    expected = nlc.nonlocal_block(wide.x, wide.params, spec, wide.key_mask, case.training)
    scale = largest(expected)
    if spec.norm == "batch" and case.training:
        r = branch(wide.x, wide.params, spec, wide.key_mask)
        variance = statistics_of(r, wide.params, case.training, wide.key_mask)[1]
        deviation = np.sqrt(variance + spec.norm_epsilon)
        scale = max(scale, largest(wide.params["norm.weight"] * r / deviation))
    assert_close(name, z, expected, dtype=dtype, scale=scale)


@check(by_reference=True)
def forward(driver: Any, case: Case, dtype: str) -> None:
    """The output equals the reference's, in shape, dtype and values."""
    data = case.data(dtype)
    z, _ = driver.block(case.spec, data.params, data.x, data.key_mask, training=case.training)
    assert_output("z", z, case, data, dtype)


@check(
    cases=lambda case: case.is_plain and case.spec.is_softmax and abs(case.spec.scale_factor) > 1 / 4,
    first=lambda case: (case.spec.pairwise, case.rank),
)
def saturated_softmax(driver: Any, case: Case, dtype: str) -> None:
    """A softmax of scores in the thousands, whose exponentials no dtype holds, takes the key with the largest."""
    data, spec = case.data(dtype), case.spec
    data = dataclasses.replace(data, x=32 * data.x)
    wide = data.wide()
    weights = nlc.attention(wide.x, wide.params, spec).max(axis=-1).reshape(data.x.shape[:-1])
    # Where two keys are near the top, rounding alone decides between them.
    clear = weights > 1 - 2.0**-30
    require(bool(clear.mean() > 1 / 2), "the data must have clear winners")
    z, _ = driver.block(spec, data.params, data.x)
    expected = nlc.nonlocal_block(wide.x, wide.params, spec)
    assert_close("z with saturated weights", z[clear], expected[clear], dtype=dtype)


@check("attention", cases=lambda case: not case.training, by_reference=True)
def attention(driver: Any, case: Case, dtype: str) -> None:
    """The rows of the weights equal the reference's: all of them, chosen ones in the chosen order, and none."""
    data, spec = case.data(dtype), case.spec
    wide = data.wide()
    expected = nlc.attention(wide.x, wide.params, spec, key_mask=wide.key_mask)
    rows = driver.attention(spec, data.params, data.x, key_mask=data.key_mask)
    assert_close("attention", rows, expected, dtype=dtype)
    for chosen in ([expected.shape[1] - 1, 0, expected.shape[1] // 2], []):
        some = driver.attention(spec, data.params, data.x, chosen, data.key_mask)
        assert_close(f"attention of the positions {chosen}", some, expected[:, chosen], dtype=dtype)


def op_arrays(case: Case, dtype: str) -> tuple[dict[str, Array], dict[str, Any], Array]:
    """Return arrays and options for the operation alone, and a gradient of its result."""
    rng = np.random.default_rng(zlib.crc32(b"op " + case.name.encode()))
    width = 3 if case.mask is None else 8  # fewer than theta and phi have, or more
    sizes = {"theta": (11, 5), "phi": (7, 5), "g": (7, width)}
    arrays = {name: rng.normal(size=(2, *size)) for name, size in sizes.items()}
    if case.spec.pairwise == "concatenation":
        arrays["concat_weight"] = rng.normal(size=10)
        if case.spec.bias["concat"]:
            arrays["concat_bias"] = rng.normal(size=())
    arrays = {name: np.asarray(a, dtype) for name, a in arrays.items()}
    options: dict[str, Any] = {"pairwise": case.spec.pairwise, "normalize": case.spec.normalize}
    if isinstance(case.spec.scale, float):
        options["scale"] = case.spec.scale
    if case.mask is not None:
        options["key_mask"] = rng.random((2, 7)) < 0.6  # noqa: PLR2004 - some, not most
        options["key_mask"][-1] = False
    return arrays, options, np.asarray(rng.normal(size=(2, 11, width)), dtype)


def operation_of(case: Case) -> tuple[Any, ...]:
    """Return what of a case concerns the operation alone."""
    spec = case.spec
    scale = spec.scale if isinstance(spec.scale, float) else None
    return spec.pairwise, spec.normalize, scale, spec.bias.get("concat"), case.mask is not None


@check("op", first=operation_of, by_reference=True)
def operation(driver: Any, case: Case, dtype: str) -> None:
    """The operation alone, with M other than N and values of another width, equals the reference's."""
    arrays, options, _ = op_arrays(case, dtype)
    wide: dict[str, Any] = {name: a.astype(np.float64) for name, a in arrays.items()}
    expected = nlc.nonlocal_op(**wide, **options)
    assert_close("y", driver.op(**arrays, **options), expected, dtype=dtype)


Hidden = tuple[tuple[float, slice], ...]

NOT_FINITE = "what is not finite"

HIDDEN: dict[str, Hidden] = {
    "large numbers": ((-1e4, slice(None)), (1e4, slice(None))),
    NOT_FINITE: ((np.inf, slice(None)), (-np.inf, slice(1)), (np.nan, slice(1))),
}
"""What the checks put at masked positions, in turn, and in which channels."""


def hidden_in(case: Case) -> dict[str, Hidden]:
    """Return what a check puts at the masked positions of a case: the last alone, where there are no others."""
    return dict(list(HIDDEN.items())[-1:]) if case.mask == "all" else HIDDEN


def with_hidden(a: Array, data: Data, values: Hidden = ((0.0, slice(None)),)) -> Array:
    """Return an array like x with these values at the masked positions, one after the other."""
    rows, masked = a.reshape(-1, a.shape[-1]).copy(), np.flatnonzero(~np.asarray(data.key_mask))
    for number, (value, channels) in enumerate(values):
        rows[masked[number :: len(values)], channels] = value
    return rows.reshape(a.shape)


@check(cases=lambda case: case.mask is not None)
def masked_positions(driver: Any, case: Case, dtype: str) -> None:
    """What stands at a masked position reaches no other z and no statistic; one that is not finite gives NaN there."""
    data, spec = case.data(dtype), case.spec
    plain, before = driver.block(spec, data.params, data.x, data.key_mask, training=case.training)
    kept = np.asarray(data.key_mask)
    for what, values in hidden_in(case).items():
        x = with_hidden(data.x, data, values)
        z, after = driver.block(spec, data.params, x, data.key_mask, training=case.training)
        name = f"beside masked positions of {what}"
        assert_close(f"z {name}", z[kept], plain[kept].astype(np.float64), dtype=dtype, scale=largest(plain))
        for statistic, expected in before.items():
            assert_close(f"{statistic} {name}", after[statistic], expected.astype(np.float64), dtype=dtype)
        if what == NOT_FINITE:
            require(bool(np.isnan(z[~kept]).all()), f"z at masked positions of {what} must be NaN in every channel")
    x = np.where(kept[..., None], np.asarray(np.nan, dtype), data.x)
    with np.errstate(invalid="ignore"):
        z, _ = driver.block(spec, data.params, x, data.key_mask, training=case.training)
    require(bool(np.isnan(z[kept]).all()), "z at a position that is NaN and not masked must be NaN")


@check("attention", cases=lambda case: case.mask is not None and not case.training)
def masked_attention(driver: Any, case: Case, dtype: str) -> None:
    """What stands at a masked position changes no row of another; where it is not finite its own row is NaN."""
    data, spec = case.data(dtype), case.spec
    plain = driver.attention(spec, data.params, data.x, key_mask=data.key_mask)
    kept = np.asarray(data.key_mask).reshape(plain.shape[:2])
    for what, values in hidden_in(case).items():
        x = with_hidden(data.x, data, values)
        rows = driver.attention(spec, data.params, x, key_mask=data.key_mask)
        name = f"the rows beside masked positions of {what}"
        assert_close(name, rows[kept], plain[kept].astype(np.float64), dtype=dtype)
        if what == NOT_FINITE:
            require(bool(np.isnan(rows[~kept]).all()), f"the rows of masked positions of {what} must be NaN")


@check(cases=lambda case: not case.is_pooled and case.spec.axes == "all" and case.spec.group_size is None)
def permutation(driver: Any, case: Case, dtype: str) -> None:
    """Without pooling, permuted positions give the permuted output."""
    data = case.data(dtype)
    grid = data.x.shape[:-1]
    order = np.random.default_rng(0).permutation(int(np.prod(grid[1:])))

    def permuted(a: Array) -> Array:
        return a.reshape(grid[0], len(order), -1)[:, order].reshape(a.shape)

    mask = None if data.key_mask is None else permuted(data.key_mask)
    plain, _ = driver.block(case.spec, data.params, data.x, data.key_mask, training=case.training)
    z, _ = driver.block(case.spec, data.params, permuted(data.x), mask, training=case.training)
    assert_close("z of permuted positions", z, permuted(plain).astype(np.float64), dtype=dtype)


@check(cases=lambda case: case.spec.subsample == 2 and case.spec.axes == "all" and case.spec.group_size is None)  # noqa: PLR2004
def permutation_in_windows(driver: Any, case: Case, dtype: str) -> None:
    """With pooling, positions reversed inside every window give the output reversed likewise."""
    data = case.data(dtype)

    def reversed_in_windows(a: Array) -> Array:
        for axis, size in enumerate(case.spatial, start=1):
            order = np.arange(size)
            order[: size // 2 * 2] = order[: size // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
            a = np.take(a, order, axis=axis)
        return a

    mask = None if data.key_mask is None else reversed_in_windows(data.key_mask)
    plain, _ = driver.block(case.spec, data.params, data.x, data.key_mask, training=case.training)
    z, _ = driver.block(case.spec, data.params, reversed_in_windows(data.x), mask, training=case.training)
    expected = reversed_in_windows(plain).astype(np.float64)
    assert_close("z of positions reversed in their windows", z, expected, dtype=dtype)


@check(first=lambda case: (case.spec.pairwise, case.training, case.mask is not None), every_dtype=False)
def determinism(driver: Any, case: Case, dtype: str) -> None:
    """The same call gives the same bits twice."""
    data = case.data(dtype)
    first, second = (
        driver.block(case.spec, data.params, data.x, data.key_mask, training=case.training)[0] for _ in range(2)
    )
    assert_same("z of a second call", second, first)


@check(every_dtype=False)
def arguments_unchanged(driver: Any, case: Case, dtype: str) -> None:
    """A call writes into none of its arguments."""
    data, kept = case.data(dtype), case.data(dtype)
    driver.block(case.spec, data.params, data.x, data.key_mask, training=case.training)
    assert_same("x after the call", data.x, kept.x)
    for name, array in kept.params.items():
        if not name.startswith("norm."):
            assert_same(f"{name} after the call", data.params[name], array)
    if kept.key_mask is not None:
        assert_same("key_mask after the call", data.key_mask, kept.key_mask)
