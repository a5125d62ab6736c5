"""Few cases instead of all: one of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nonlocal_conformance.cases import CASES, Case

__all__ = ["first_of_each"]


def first_of_each(
    fits: Callable[[Case], bool], kind: Callable[[Case], Any] = lambda case: case.spec.pairwise
) -> Callable[[Case], bool]:
    """Return what is true of the first case of `CASES` of each kind that fits, and of a driver's own cases that fit.

    Args:
        fits: which cases are among those to choose from.
        kind: what tells them apart, the pairwise form unless said otherwise.
    """
    chosen = {kind(case): case.name for case in reversed(CASES.values()) if fits(case)}
    return lambda case: fits(case) and (case.name in chosen.values() or case.name not in CASES)
