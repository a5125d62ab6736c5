"""What a check is: a plain function of a driver, a case and a dtype, and where it applies."""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np

from nonlocal_conformance.capabilities import CAPABILITIES
from nonlocal_conformance.cases import CASES, Case
from nonlocal_conformance.cuts import CUTS
from nonlocal_conformance.driver import Driver
from nonlocal_core import NonLocalSpec
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.planning import METHODS, serves

__all__ = ["CHECKS", "Bound", "Check", "Unsupported", "bind", "check", "methods_of", "without_case"]

Run = Callable[[Any, Case, str], None]


class Unsupported(Exception):  # noqa: N818 - it is an answer, not an error
    """Raised by a driver for a spec or an option that its implementation cannot express."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A named property of an implementation.

    Args:
        name: unique, without "-".
        run: raises AssertionError if the property does not hold.
        needs: the capabilities without which the check says nothing.
        applies: whether it runs on a case.
        first: of the cases with one value of this, only the first of a driver runs; None: all do.
        every_dtype: whether it runs in the narrower dtypes of the driver on narrow cases, or in the widest alone.
        by_reference: whether it asks for no more than what the reference gives, so that the reference's own driver
            would be compared with itself.
    """

    name: str
    run: Run
    needs: frozenset[str]
    applies: Callable[[Case], bool]
    first: Callable[[Case], Hashable] | None
    every_dtype: bool
    by_reference: bool


@dataclasses.dataclass(frozen=True)
class Bound:
    """A check with its driver, case and dtype: call it to run it."""

    check: Check
    driver: Any
    case: Case
    dtype: str

    @property
    def id(self) -> str:
        """The name under which it is reported and expected to fail."""
        return f"{self.check.name}-{self.case.name}-{self.dtype}"

    def __call__(self) -> None:
        """Run the check.

        Raises:
            AssertionError: if the property does not hold.
            Unsupported: if the driver says that it cannot express the case.
        """
        self.check.run(self.driver, self.case, self.dtype)


CHECKS: dict[str, Check] = {}

_WITHOUT_METHOD = ("large", "functions", "errors", "casts", "uneven")
"""The capabilities that say how the methods of a driver behave."""


def check(
    *needs: str,
    cases: Callable[[Case], bool] = lambda _: True,
    first: Callable[[Case], Hashable] | None = None,
    every_dtype: bool = True,
    by_reference: bool = False,
) -> Callable[[Run], Run]:
    """Register a function as a check; its name is the check's, its docstring says what must hold."""

    def applies(case: Case) -> bool:
        return (case.cut is not None) == ("sharded" in needs) and cases(case)

    def register(run: Run) -> Run:
        CHECKS[run.__name__] = Check(run.__name__, run, frozenset(needs), applies, first, every_dtype, by_reference)
        return run

    return register


def bind(driver: Driver) -> list[Bound]:
    """Return every check that applies to a driver, on every case and dtype.

    Cases with names run in the widest dtype of the driver, a selection in the others too; those of the covering array
    in the one that it gives them. A driver whose implementation can
    express few of `CASES` and `CUTS` has cases of its own, in an attribute `cases`.

    Raises:
        TypeError: if the driver is a class, or lacks an attribute or a method that it must have.
        ValueError: if it names a capability that there is not.
    """
    _check_driver(driver)
    return list(_bind(driver))


def _check_driver(driver: Any) -> None:
    """Check what a driver says of itself: a check for which it lacks something would not run, and nobody would see."""
    if isinstance(driver, type):
        raise fail_type("driver", "be an instance of a driver class", driver)
    missing = [name for name in ("name", "dtypes", "methods", "capabilities", "block") if not hasattr(driver, name)]
    if missing:
        message = f"`driver` must have the attributes of a driver. Got {type(driver).__name__} without {missing}."
        raise TypeError(message)
    for name in driver.dtypes:
        if name not in {"float64", "float32"}:  # what the tolerance of a result is made for
            raise fail_value("dtypes", "be some of float64, float32; others are `mixed_dtypes`", repr(name))
    for name in sorted(driver.capabilities):
        if name not in CAPABILITIES:
            near = difflib.get_close_matches(name, CAPABILITIES, cutoff=0.3)
            raise fail_value("capabilities", f"be some of {', '.join(CAPABILITIES)}", f"{name!r}; near names: {near}")
        if name not in _WITHOUT_METHOD and not callable(getattr(driver, name, None)):
            message = f"`driver` must have a method for each of its capabilities. Got none for {name!r}."
            raise TypeError(message)


def methods_of(driver: Driver, spec: NonLocalSpec) -> tuple[str, ...]:
    """Return the methods of a driver that serve the form of a spec; those of names of its own are taken to.

    "auto" chooses one of the others, and is left out where there are any.
    """
    found = tuple(name for name in driver.methods if serves(name, spec.pairwise) or name not in METHODS)
    return tuple(name for name in found if name != "auto") or found


def without_case(driver: Driver) -> list[str]:
    """Return the checks of the capabilities of a driver that apply to none of its cases."""
    bound = {one.check.name for one in bind(driver)}
    return [one.name for one in _checks_of(driver) if one.name not in bound]


def _checks_of(driver: Driver) -> list[Check]:
    """Return the checks of the capabilities of a driver."""
    # What a class says of itself: a driver derived from that of the reference is none.
    is_reference = vars(type(driver)).get("is_reference", False)
    return [
        one for one in CHECKS.values() if one.needs <= driver.capabilities and not (one.by_reference and is_reference)
    ]


def _bind(driver: Driver) -> Iterator[Bound]:
    widest = max(driver.dtypes, key=lambda name: np.dtype(name).itemsize)
    checks = _checks_of(driver)
    seen: dict[str, set[Hashable]] = defaultdict(set)
    # One case after the other: what a framework compiles for it then serves all its checks.
    for case in getattr(driver, "cases", (*CASES.values(), *CUTS.values())):
        if callable(case.options.get("pairwise")) and "functions" not in driver.capabilities:
            continue
        if case.is_uneven and "uneven" not in driver.capabilities:
            continue
        for one in checks:
            if not one.applies(case):
                continue
            if one.first is not None:
                key = one.first(case)
                if key in seen[one.name]:
                    continue
                seen[one.name].add(key)
            narrower = [dtype for dtype in driver.dtypes if dtype != widest and one.every_dtype and case.narrow]
            if case.wide or not narrower:
                yield Bound(one, driver, case, widest)
            yield from (Bound(one, driver, case, dtype) for dtype in narrower)
