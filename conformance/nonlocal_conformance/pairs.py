"""Cases in which every pair of values of the options meets, and every triple of those that interact.

`VALUES` are the factors and their values, `pairs.csv` the rows of a covering array over them, one case each. The
tests of this project make the table and prove what it covers.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from nonlocal_conformance.case import Case
from nonlocal_core import NonLocalSpec
from nonlocal_core.geometry import interacting_axes

__all__ = ["VALUES", "case_of", "named", "read", "rows"]

Row = Mapping[str, str]

SPATIAL = {
    "unequal": {"1": (11,), "2": (5, 7), "3": (4, 5, 3)},
    "equal": {"2": (6, 6), "3": (4, 4, 5)},
    "single": {"2": (7, 1), "3": (4, 5, 1)},
}
"""The sizes: without equal ones and with a remainder after windows of 2, with two equal ones, with an axis of 1."""

SETS: dict[str, dict[str, Any]] = {
    "all": {},
    "groups": {"group_size": 2},
    "frames": {"group_size": 1},
    "space": {"axes": "space"},
    "time": {"axes": "time"},
    "first": {"axes": (0,)},
    "second": {"axes": (1,)},
    "first_two": {"axes": (0, 1)},
    "outer_two": {"axes": (0, 2)},
}
WIDTHS = {"less": (7, 5), "equal": (6, 6), "more": (5, 11), "one_inner": (7, 1), "one_channel": (1, 3)}
BIAS: dict[str, Any] = {"all": True, "none": False, "some": {"theta": False, "out": False, "concat": True}}
SCALES = {"none": None, "inner": "inner", "input": "input", "positive": 1.5, "negative": -0.7}
MOMENTS = {"usual": {}, "still": {"norm_momentum": 0.0, "norm_epsilon": 0.5}, "fast": {"norm_momentum": 0.9}}

VALUES: dict[str, tuple[str, ...]] = {
    "pairwise": ("gaussian", "embedded_gaussian", "dot_product", "concatenation"),
    "rank": ("1", "2", "3"),
    "sets": tuple(SETS),
    "window": ("none", "one", "two", "uneven", "whole"),
    "sizes": tuple(SPATIAL),
    "place": ("projection", "input"),
    "mask": ("none", "some", "all"),
    "norm": ("none", "batch", "affine"),
    "training": ("no", "yes"),
    "scale": tuple(SCALES),
    "bias": tuple(BIAS),
    "widths": tuple(WIDTHS),
    "residual": ("yes", "no"),
    "zero_init": ("yes", "no"),
    "moments": tuple(MOMENTS),
    "batch": ("1", "2", "3"),
    "ties": ("no", "yes"),
    "dtypes": ("widest", "narrower"),
}
"""The values of each factor."""


def case_of(row: Row, name: str = "row") -> Case:
    """Return the case of a row, a value for each factor.

    Raises:
        ValueError: if these values do not go together.
    """
    spatial = SPATIAL[row["sizes"]].get(row["rank"])
    if spatial is None:
        message = f"`sizes` must be unequal for rank {row['rank']}. Got {row['sizes']!r}."
        raise ValueError(message)
    channels, inner = WIDTHS[row["widths"]]
    sets = SETS[row["sets"]]
    layers = NonLocalSpec(channels=1, pairwise=row["pairwise"]).layers
    bias = BIAS[row["bias"]]
    options = {
        "pairwise": row["pairwise"],
        "channels": channels,
        "inner_channels": inner,
        "subsample": _window(row["window"], spatial, sets),
        "subsample_at": row["place"],
        "norm": {"none": None}.get(row["norm"], row["norm"]),
        "scale": SCALES[row["scale"]],
        "bias": bias if isinstance(bias, bool) else {layer: bias[layer] for layer in layers if layer in bias},
        "residual": row["residual"] == "yes",
        "zero_init": row["zero_init"] == "yes",
        **sets,
        **MOMENTS[row["moments"]],
    }
    mask, training = {"none": None}.get(row["mask"], row["mask"]), row["training"] == "yes"
    ties, narrow = row["ties"] == "yes", row["dtypes"] == "narrower"
    case = Case(
        name, options, spatial, int(row["batch"]), mask, training=training, ties=ties, narrow=narrow, wide=not narrow
    )
    case.spec.check_input((case.batch, *spatial, channels), training=training)
    return case


def _window(kind: str, spatial: tuple[int, ...], sets: Mapping[str, Any]) -> Any:
    """Return `subsample` for sizes that are cut into sets."""
    if kind in {"none", "two"}:
        return {"none": None, "two": 2}[kind]
    axes = [axis for axis in interacting_axes(sets.get("axes", "all"), len(spatial)) if axis < len(spatial)]
    lengths = [1] * len(spatial)
    inside = [min(sets.get("group_size", spatial[0]), spatial[0]), *spatial[1:]]
    for number, axis in enumerate(axes):
        lengths[axis] = {"one": 1, "uneven": 2 + number % 2, "whole": 1}[kind]
    if kind == "whole" and axes:
        lengths[axes[-1]] = inside[axes[-1]]
    return tuple(lengths)


def rows() -> list[dict[str, str]]:
    """Return the rows of the table."""
    text = files("nonlocal_conformance").joinpath("pairs.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def read() -> list[Case]:
    """Return the cases of the table."""
    return [named(row, number) for number, row in enumerate(rows(), 1)]


def named(row: Row, number: int) -> Case:
    """Return the case of the row of this number, with the seed that the table gives its data."""
    case = case_of(row, f"{row['pairwise']}_pairs_{number}")
    return dataclasses.replace(case, seed=int(row["seed"]))
