"""Two of the three ways to run the checks: without pytest, and inside one's own pytest suite."""

from __future__ import annotations

import dataclasses
import fnmatch
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from nonlocal_conformance.registry import Bound, Unsupported, bind
from nonlocal_core.arguments import check_choice

__all__ = ["ConformanceError", "Result", "parametrize_with_checks", "run_checks"]

Outcome = Literal["passed", "failed", "expected failure", "unexpected pass", "unsupported"]


NOTHING_TESTED = "Nothing was tested: no check applies to a case that the driver can express."


class ConformanceError(AssertionError):
    """An implementation that fails a check, or passes one that it was expected to fail."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one check on one case.

    Args:
        check: the name of the check.
        id: "check-case-dtype".
        outcome: "passed", "failed", "expected failure", "unexpected pass" or "unsupported".
        message: what went wrong, or why that was expected.
        seconds: the processor time that it took in this process, which other processes do not lengthen.
    """

    check: str
    id: str
    outcome: Outcome
    message: str = ""
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def is_wrong(self) -> bool:
        """Whether this result fails a run."""
        return self.outcome in {"failed", "unexpected pass"}


def run_checks(
    driver: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    on_failure: Literal["raise", "return"] = "raise",
    on_result: Callable[[Result], object] = lambda _: None,
) -> list[Result]:
    """Run every check that applies to a driver, without pytest.

    A line on the standard error stream, where that is a terminal, says how far it is.

    Args:
        driver: an instance of a driver class.
        expected_failures: from the name of a check, an id "check-case-dtype" or a pattern of ids to the reason.
            Each check that a key matches must fail.
        on_failure: "raise" an error that lists what went wrong, at the end, or "return" the results alone.
        on_result: called with each result as it comes.

    Returns:
        One result for each check, case and dtype.

    Raises:
        ConformanceError: if a check fails that was not expected to, or passes that was expected to fail, or if nothing
            was tested, as the driver can express none of its cases.
        ValueError: if a key of `expected_failures` matches no check, or `on_failure` is neither word.

    Example:
        >>> from nonlocal_conformance.cases import CASES
        >>> from nonlocal_conformance.drivers.numpy import NumpyDriver
        >>> driver = NumpyDriver()
        >>> driver.cases = (CASES["dot_product_2d"],)  # without this line, all of them, which takes a minute or two
        >>> {result.outcome for result in run_checks(driver)}
        {'passed'}
    """
    check_choice("on_failure", on_failure, ("raise", "return"))
    bound = bind(driver)
    reasons = match_expected(bound, expected_failures)
    results = []
    for number, one in enumerate(bound, 1):
        _show(f"{number} of {len(bound)}: {one.id}")
        start = time.process_time()
        result = _result(one, reasons.get(one.id))
        results.append(dataclasses.replace(result, seconds=time.process_time() - start))
        _show("")
        on_result(results[-1])
    wrong = [result for result in results if result.is_wrong]
    if wrong and on_failure == "raise":
        lines = [f"{result.outcome}: {result.id}: {result.message}" for result in wrong]
        raise ConformanceError("\n".join([f"{len(wrong)} of {len(results)} checks went wrong", *lines]))
    if on_failure == "raise" and all(result.outcome == "unsupported" for result in results):
        raise ConformanceError(NOTHING_TESTED)
    return results


def parametrize_with_checks(driver: Any, *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """Return a pytest decorator that runs a test once for each check that applies to a driver.

    Args:
        driver: an instance of a driver class.
        expected_failures: as for `run_checks`; each becomes a strict xfail with its reason.

    Returns:
        A decorator that fills in the argument `check` of the test, which must call it. What the implementation
        cannot express is skipped with its reason; where that is all of it, the last one fails.

    Raises:
        ValueError: if a key of `expected_failures` matches no check.

    Example:
        >>> from nonlocal_conformance.drivers.numpy import NumpyDriver
        >>> @parametrize_with_checks(NumpyDriver())
        ... def test_my_block(check):
        ...     check()
    """
    import pytest

    bound = bind(driver)
    reasons = match_expected(bound, expected_failures)
    left = {one.id for one in bound}
    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                _or_skipped(one, left),
                id=one.id,
                marks=[pytest.mark.xfail(reason=reasons[one.id], strict=True)] if one.id in reasons else [],
            )
            for one in bound
        ],
    )


def _or_skipped(one: Bound, left: set[str]) -> Callable[[], None]:
    """Return a call of a check that skips the test where the implementation cannot express the case.

    It takes its id from those that are left; the last one fails.
    """
    import pytest

    def check() -> None:
        try:
            one()
        except Unsupported as answer:
            left.discard(one.id)
            if not left:
                pytest.fail(NOTHING_TESTED)
            pytest.skip(str(answer))

    return check


def match_expected(bound: list[Bound], expected: Mapping[str, str] | None) -> dict[str, str]:
    """Return the reason for each id that is expected to fail."""
    reasons: dict[str, str] = {}
    for key, reason in (expected or {}).items():
        matched = [one.id for one in bound if key == one.check.name or fnmatch.fnmatchcase(one.id, key)]
        if not matched:
            message = f"`expected_failures` must name checks that run. Got {key!r}, which matches none."
            raise ValueError(message)
        if not isinstance(reason, str) or not reason.strip():
            message = f"`expected_failures` must give a reason for {key!r}. Got {reason!r}."
            raise ValueError(message)
        reasons |= dict.fromkeys(matched, reason)
    return reasons


def _show(text: str) -> None:
    """Write a text over the last one, on a terminal only."""
    if sys.stderr is not None and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{text[:width]:{width}}\r")
        sys.stderr.flush()


def _result(one: Bound, reason: str | None) -> Result:
    name = one.check.name
    try:
        one()
    except Unsupported as answer:
        return Result(name, one.id, "unsupported", str(answer))
    except Exception as error:  # noqa: BLE001 - whatever an implementation raises is its failure
        if reason is not None:
            return Result(name, one.id, "expected failure", reason)
        return Result(name, one.id, "failed", f"{type(error).__name__}: {error}")
    if reason is not None:
        return Result(name, one.id, "unexpected pass", f"it was expected to fail: {reason}")
    return Result(name, one.id, "passed")
