"""The checks, by topic; importing this package fills the registry."""

from nonlocal_conformance.checks import (
    derivatives,
    errors,
    methods,
    networks,
    numerics,
    start,
    statistics,
    training,
    values,
)

__all__ = ["derivatives", "errors", "methods", "networks", "numerics", "start", "statistics", "training", "values"]
