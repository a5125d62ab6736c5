"""The cases: a spec, a shape and seeded data on which a fault has nowhere to hide."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_core import NonLocalSpec, param_shapes

__all__ = ["CASES", "Case", "Data", "beyond_first", "dtype_named", "relu_of_product"]

Array = np.ndarray[Any, Any]

CHANNELS, INNER = 7, 5
SPATIAL = {1: (11,), 2: (5, 7), 3: (4, 5, 3)}
"""Unequal sizes, of which pooling by 2 leaves a remainder."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The arrays of a case, in one dtype; no parameter is zero, no statistic trivial."""

    x: Array
    params: dict[str, Array]
    dz: Array
    key_mask: Array | None

    def wide(self) -> Data:
        """Return the same numbers in float64, for the reference."""
        params = {name: array.astype(np.float64) for name, array in self.params.items()}
        return Data(self.x.astype(np.float64), params, self.dz.astype(np.float64), self.key_mask)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of the block.

    Args:
        name: unique, without "-".
        options: the options of the spec.
        spatial: the sizes S1..Sk.
        batch: B.
        mask: None, "some" for a random mask whose last sample has no key at all, or "all" where no sample has one.
        training: whether batch normalisation uses the statistics of the input.
        ties: whether values repeat, so that windows of the pooling hold ties.
    """

    name: str
    options: Mapping[str, Any]
    spatial: tuple[int, ...]
    batch: int = 2
    mask: str | None = None
    training: bool = False
    ties: bool = False

    @functools.cached_property
    def spec(self) -> NonLocalSpec:
        """The spec of the block."""
        return NonLocalSpec(**{"channels": CHANNELS, "inner_channels": INNER, **self.options})

    @property
    def is_pooled(self) -> bool:
        """Whether keys are pooled."""
        return self.spec.subsample is not None

    @property
    def is_differentiable(self) -> bool:
        """Whether the reference has gradients: a function of the user's has none."""
        return isinstance(self.spec.pairwise, str)

    def data(self, dtype: str = "float64") -> Data:
        """Return the arrays of this case, the same on every call, rounded to `dtype`."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape = (self.batch, *self.spatial, self.spec.channels)
        x = rng.normal(size=shape)
        if self.ties:
            x = np.maximum(np.round(x), 0.0)
        params = {name: _parameter(name, size, rng) for name, size in param_shapes(self.spec).items()}
        dz = rng.normal(size=shape)
        mask = None
        if self.mask is not None:
            mask = rng.random(shape[:-1]) < 0.6  # noqa: PLR2004 - some, not most
            mask[-1 if self.mask == "some" else slice(None)] = False
        kind = dtype_named(dtype)
        return Data(x.astype(kind), {name: a.astype(kind) for name, a in params.items()}, dz.astype(kind), mask)


def relu_of_product(theta: Any, phi: Any) -> Any:
    """Return ReLU((theta_i + 1) . phi_j), a form of one's own in any array library; its arguments cannot be swapped."""
    product = ((theta + 1)[:, :, None, None, :] @ phi[:, None, :, :, None])[..., 0, 0]
    return (abs(product) + product) / 2


def beyond_first(theta: Any, phi: Any) -> Any:
    """Return by how much theta_i . phi_j exceeds that of the first query of the set: the places of queries matter."""
    product = (theta[:, :, None, None, :] @ phi[:, None, :, :, None])[..., 0, 0]
    return product - product[:, :1, :]


def dtype_named(name: str) -> Any:
    """Return a dtype by its name, bfloat16 too."""
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


def _parameter(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if name == "norm.variance":
        return rng.uniform(0.5, 2.0, shape)
    if name.endswith(".weight") and not name.startswith("norm."):
        return rng.normal(size=shape) / np.sqrt(shape[-1])
    sign = rng.choice([-1.0, 1.0], shape)
    return sign * rng.uniform(0.5, 1.5, shape)


def _cases() -> list[Case]:
    cases = []
    for form in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
        base = {"pairwise": form}
        cases += [Case(f"{form}_{rank}d", base, spatial) for rank, spatial in SPATIAL.items()]
        for rank, place in ((1, "projection"), (2, "projection"), (3, "input")):
            options = {**base, "subsample": 2, "subsample_at": place}
            cases.append(Case(f"{form}_{rank}d_pooled_{place}", options, SPATIAL[rank]))
        pooled = {"subsample": (2, 3), "norm": "batch"}
        cases += [
            Case(f"{form}_masked", base, SPATIAL[2], batch=3, mask="some"),
            Case(f"{form}_masked_projection", {**base, **pooled}, SPATIAL[2], batch=3, mask="some"),
            Case(
                f"{form}_masked_input",
                {**base, **pooled, "subsample_at": "input", "norm": "affine"},
                SPATIAL[2],
                batch=3,
                mask="some",
            ),
            Case(f"{form}_batch_norm", {**base, "norm": "batch"}, SPATIAL[1], batch=3),
            Case(f"{form}_training", {**base, "norm": "batch", "norm_momentum": 0.3}, SPATIAL[2], training=True),
            Case(f"{form}_groups", {**base, "group_size": 2, "subsample": (1, 2, 2)}, SPATIAL[3]),
            Case(f"{form}_space", {**base, "axes": "space", "scale": "inner"}, SPATIAL[3]),
            Case(f"{form}_scaled", {**base, "scale": -0.7, "residual": False}, SPATIAL[1]),
            Case(f"{form}_ties", {**base, "subsample": 2, "subsample_at": "input"}, SPATIAL[2], ties=True),
        ]
    concat = {"pairwise": "concatenation"}
    embedded, dot = {"pairwise": "embedded_gaussian"}, {"pairwise": "dot_product"}
    return [
        *cases,
        Case("scale_input", {**embedded, "scale": "input"}, SPATIAL[2]),
        Case("scale_inner", {**dot, "scale": "inner"}, SPATIAL[2]),
        Case("no_bias", {**embedded, "bias": False}, SPATIAL[2]),
        Case("some_bias", {**embedded, "bias": {"theta": False, "out": False}}, SPATIAL[2]),
        Case("concat_bias", {**concat, "bias": {"concat": True}, "scale": -1.5}, SPATIAL[2]),
        Case("affine", {**embedded, "norm": "affine"}, SPATIAL[2]),
        Case("epsilon", {**embedded, "norm": "batch", "norm_epsilon": 0.5}, SPATIAL[2]),
        Case("training_masked", {**dot, "norm": "batch"}, SPATIAL[2], batch=3, mask="some", training=True),
        Case("training_all_masked", {**embedded, "norm": "batch"}, SPATIAL[1], mask="all", training=True),
        Case("time", {**embedded, "axes": "time"}, SPATIAL[3]),
        Case("time_masked", {**dot, "axes": "time", "subsample": 2}, SPATIAL[3], mask="some"),
        Case("height", {**embedded, "axes": (0,)}, SPATIAL[2]),
        Case("frames_and_width", {**concat, "axes": (0, 2), "subsample": 2}, (4, 5, 3), mask="some"),
        Case("groups_masked", {**dot, "group_size": 2}, SPATIAL[3], mask="some"),
        Case("groups_pooled_frames", {**embedded, "group_size": 2, "subsample": 2}, SPATIAL[3]),
        Case("groups_with_remainder", {**embedded, "group_size": 3, "subsample": 2}, (6, 5, 3)),
        Case("window_of_one", {**embedded, "subsample": (1, 1)}, SPATIAL[2]),
        Case("one_position", embedded, (1, 1)),
        Case("wide_inner", {**embedded, "inner_channels": 11}, SPATIAL[2]),
        Case("default_inner", {**embedded, "inner_channels": None}, SPATIAL[2]),
        Case("function_softmax", {"pairwise": relu_of_product, "normalize": "softmax"}, SPATIAL[2]),
        Case(
            "function_count",
            {"pairwise": relu_of_product, "normalize": "count", "subsample": 2, "scale": 0.3},
            SPATIAL[2],
            mask="some",
        ),
        Case(
            "function_of_places",
            {"pairwise": beyond_first, "normalize": "softmax", "axes": "space", "subsample": 2},
            SPATIAL[3],
        ),
    ]


CASES = {case.name: case for case in _cases()}
