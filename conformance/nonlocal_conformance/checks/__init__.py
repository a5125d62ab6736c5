"""The checks, by topic; importing this package fills the registry."""

from nonlocal_conformance.checks import (
    derivatives,
    errors,
    layers,
    methods,
    networks,
    numerics,
    start,
    state,
    statistics,
    training,
    values,
)

__all__ = [
    "derivatives",
    "errors",
    "layers",
    "methods",
    "networks",
    "numerics",
    "start",
    "state",
    "statistics",
    "training",
    "values",
]
