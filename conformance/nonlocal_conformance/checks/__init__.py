"""The checks, by topic; importing this package fills the registry."""

from nonlocal_conformance.checks import (
    compiled,
    derivatives,
    dtypes,
    errors,
    layers,
    methods,
    networks,
    numerics,
    sharded,
    start,
    state,
    statistics,
    training,
    values,
)

__all__ = [
    "compiled",
    "derivatives",
    "dtypes",
    "errors",
    "layers",
    "methods",
    "networks",
    "numerics",
    "sharded",
    "start",
    "state",
    "statistics",
    "training",
    "values",
]
