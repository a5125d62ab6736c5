"""The cases: named ones, and those of a covering array in which every pair of options meets."""

from __future__ import annotations

from functools import partial
from typing import Any

from nonlocal_conformance import pairs
from nonlocal_conformance.case import Array, Case, Data

__all__ = ["CASES", "Array", "Case", "Data", "beyond_first", "relu_of_product"]

SPATIAL = {1: (11,), 2: (5, 7), 3: (4, 5, 3)}
"""Unequal sizes, of which pooling by 2 leaves a remainder."""


def relu_of_product(theta: Any, phi: Any) -> Any:
    """Return ReLU((theta_i + 1) . phi_j), a form of one's own in any array library; its arguments cannot be swapped."""
    product = ((theta + 1)[:, :, None, None, :] @ phi[:, None, :, :, None])[..., 0, 0]
    return (abs(product) + product) / 2


def beyond_first(theta: Any, phi: Any) -> Any:
    """Return by how much theta_i . phi_j exceeds that of the first query of the set: the places of queries matter."""
    product = (theta[:, :, None, None, :] @ phi[:, None, :, :, None])[..., 0, 0]
    return product - product[:, :1, :]


def _cases() -> list[Case]:
    wide, cases = partial(Case, narrow=False), []
    for form in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
        base = {"pairwise": form}
        batch, pooled = {**base, "norm": "batch"}, {**base, "subsample": 2}
        cases += [
            wide(f"{form}_1d", base, SPATIAL[1], seed=1),
            Case(f"{form}_2d", base, SPATIAL[2]),
            Case(f"{form}_masked_projection", {**batch, "subsample": (2, 3)}, SPATIAL[2], batch=3, mask="some", seed=3),
            wide(f"{form}_batch_norm", batch, SPATIAL[1], batch=3),
            Case(f"{form}_training", {**batch, "norm_momentum": 0.3}, SPATIAL[2], training=True),
            wide(f"{form}_groups", {**base, "group_size": 2, "subsample": (1, 2, 2)}, SPATIAL[3]),
            wide(f"{form}_ties", {**pooled, "subsample_at": "input"}, SPATIAL[2], ties=True),
        ]
    concat = {"pairwise": "concatenation"}
    embedded, dot = {"pairwise": "embedded_gaussian"}, {"pairwise": "dot_product"}
    named = [
        *cases,
        wide("some_bias", {**embedded, "bias": {"theta": False, "out": False}}, SPATIAL[2]),
        wide("concat_bias", {**concat, "bias": {"concat": True}, "scale": -1.5}, SPATIAL[2]),
        wide("affine", {**embedded, "norm": "affine"}, SPATIAL[2]),
        wide("epsilon", {**embedded, "norm": "batch", "norm_epsilon": 0.5}, SPATIAL[2]),
        Case("training_masked", {**dot, "norm": "batch"}, SPATIAL[2], batch=3, mask="some", training=True),
        wide("training_all_masked", {**embedded, "norm": "batch"}, SPATIAL[1], mask="all", training=True),
        wide("groups_pooled_frames", {**embedded, "group_size": 2, "subsample": 2}, SPATIAL[3], seed=2),
        wide("groups_with_remainder", {**embedded, "group_size": 3, "subsample": 2}, (6, 5, 3)),
        wide("first_two_axes", {**embedded, "axes": (0, 1), "subsample": (2, 1, 1)}, SPATIAL[3]),
        wide("one_position", embedded, (1, 1)),
        wide("default_inner", {**embedded, "inner_channels": None}, SPATIAL[2]),
        wide("function_softmax", {"pairwise": relu_of_product, "normalize": "softmax"}, SPATIAL[2]),
        wide(
            "function_count",
            {"pairwise": relu_of_product, "normalize": "count", "subsample": 2, "scale": 0.3},
            SPATIAL[2],
            mask="some",
        ),
        wide(
            "function_of_places",
            {"pairwise": beyond_first, "normalize": "softmax", "axes": "space", "subsample": 2},
            SPATIAL[3],
        ),
    ]
    return [*named, *pairs.read()]


CASES = {case.name: case for case in _cases()}
