"""The checks, by topic; importing this package fills the registry."""

from nonlocal_conformance.checks import derivatives, errors, numerics, start, statistics, values

__all__ = ["derivatives", "errors", "numerics", "start", "statistics", "values"]
