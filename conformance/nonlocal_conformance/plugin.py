"""The third way to run the checks: a pytest plugin, loaded by `-p nonlocal_conformance.plugin` alone.

It gives the options `--backend`, `--device` and `--expected-failures`, the argument `bound_check` to a test, and a
header that says what is tested. It is no pytest11 entry point, which would load in everyone's pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nonlocal_conformance import loader
from nonlocal_conformance.registry import Unsupported, bind
from nonlocal_conformance.runner import match_expected
from nonlocal_core import SPECIFICATION_VERSION, __version__
from nonlocal_core.files.regular import read_file

__all__ = ["read_expected"]

_CELL = "conformance cell"
_DRIVERS = pytest.StashKey[tuple[list[Any], dict[str, str]]]()
_REASONS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("non-local conformance")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        help="a backend to test, by name or as package.module:Driver; repeatable; default: all that are installed",
    )
    group.addoption("--device", default="cpu", help="the device of the backends, for example cpu or cuda")
    group.addoption(
        "--expected-failures",
        type=Path,
        help="a file of lines `check  # reason`: names of checks, ids or patterns of ids that must fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Load the backends; one that was named and is missing is an error."""
    named, device = config.getoption("--backend"), config.getoption("--device")
    try:
        found = ([loader.load(name, device) for name in named], {}) if named else loader.available(device)
    except (ImportError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error
    if not found[0]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found[1].items())
        message = f"`--device` must be one that a backend has. Got {device!r}. {reasons}"
        raise pytest.UsageError(message)
    config.stash[_DRIVERS] = found
    config.stash[_REASONS] = _reasons(config.getoption("--expected-failures"), found[0])


def _reasons(path: Path | None, drivers: list[Any]) -> dict[str, str]:
    """Return the reason for each id that is expected to fail."""
    if path is None:
        return {}
    if len(drivers) != 1:
        message = f"`--expected-failures` must go with one --backend. Got {len(drivers)} backends."
        raise pytest.UsageError(message)
    try:
        return match_expected(bind(drivers[0]), read_expected(path))
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is tested."""
    drivers, missing = config.stash[_DRIVERS]
    return [
        f"non-local conformance: specification {SPECIFICATION_VERSION}, nonlocal-core {__version__}",
        *(_described(driver) for driver in drivers),
        *(f"backend {name} is not tested: {reason}" for name, reason in missing.items()),
    ]


def _described(driver: Any) -> str:
    """Return what a driver runs, with its notes on how, if it has any."""
    notes = getattr(driver, "notes", None)
    return f"backend {driver.name} {driver.version} on {driver.device}" + (f", {notes}" if notes else "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in `bound_check` with every check that applies to each backend."""
    if "bound_check" in metafunc.fixturenames:
        metafunc.parametrize("bound_check", list(_parameters(metafunc.config)))


def _parameters(config: pytest.Config) -> Iterator[Any]:
    (drivers, missing), reasons = config.stash[_DRIVERS], config.stash[_REASONS]
    for driver in drivers:
        for one in bind(driver):
            marks = [pytest.mark.xfail(reason=reasons[one.id], strict=True)] if one.id in reasons else []
            yield pytest.param(one, id=f"{driver.name}-{one.id}", marks=marks)
    for name, reason in missing.items():
        yield pytest.param(None, id=name, marks=pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note what ran for the table, and report what an implementation cannot express as skipped."""
    bound = getattr(item, "funcargs", {}).get("bound_check")
    if bound is not None:
        item.user_properties.append((_CELL, (bound.check.name, bound.driver.name)))
    try:
        return (yield)
    except Unsupported as answer:
        pytest.skip(str(answer))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one table, check by backend, of how many cases passed."""
    cells: dict[tuple[str, str], list[bool]] = {}
    for outcome in ("passed", "failed", "xfailed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, cell in getattr(report, "user_properties", []):
                if name == _CELL:
                    cells.setdefault(tuple(cell), []).append(outcome == "passed")
    if not cells:
        return
    names = sorted({driver for _, driver in cells})
    terminalreporter.section("non-local conformance: cases that passed")
    terminalreporter.line("".join([f"{'check':24}", *(f"{name:>14}" for name in names)]))
    for check in sorted({check for check, _ in cells}):
        counts = [cells.get((check, name)) for name in names]
        shown = ["-" if c is None else f"{sum(c)}" if all(c) else f"{sum(c)} of {len(c)}" for c in counts]
        terminalreporter.line("".join([f"{check:24}", *(f"{text:>14}" for text in shown)]))


def read_expected(path: Path) -> dict[str, str]:
    """Return the expected failures of a file: a mapping from check to reason.

    Raises:
        ValueError: if a line has no reason.
    """
    expected = {}
    for number, line in enumerate(read_file(path).decode().splitlines(), start=1):
        name, _, reason = (part.strip() for part in line.partition("#"))
        if not name:
            continue
        if not reason:
            message = f"`expected_failures` must give a reason after '#'. Got {line!r} on line {number} of {path}."
            raise ValueError(message)
        expected[name] = reason
    return expected
