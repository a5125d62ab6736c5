"""The conformance suite of the non-local block: checks that any implementation can be put through.

Three ways lead to one list of checks: `run_checks(driver)`, the decorator `parametrize_with_checks(driver)` in one's
own tests, and the command `nonlocal conformance package.module:Driver`. A driver is a small class that speaks for
one implementation in NumPy arrays; `nonlocal_conformance.drivers.numpy` is one to start from.
"""

from nonlocal_conformance import checks as _checks
from nonlocal_conformance.cases import CASES, Case
from nonlocal_conformance.cuts import CUTS
from nonlocal_conformance.registry import CHECKS, Check, Unsupported
from nonlocal_conformance.runner import ConformanceError, Result, parametrize_with_checks, run_checks

__all__ = [
    "CASES",
    "CHECKS",
    "CUTS",
    "Case",
    "Check",
    "ConformanceError",
    "Result",
    "Unsupported",
    "parametrize_with_checks",
    "run_checks",
]

del _checks
