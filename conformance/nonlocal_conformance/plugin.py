"""The third way to run the checks: a pytest plugin, loaded by `-p nonlocal_conformance.plugin` alone.

It gives the options `--backend`, `--device` and `--expected-failures`, the argument `bound_check` to a test, and a
header that says what is tested. It is no pytest11 entry point, which would load in everyone's pytest.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nonlocal_conformance import loader
from nonlocal_conformance.registry import Unsupported, bind, without_case
from nonlocal_conformance.runner import NOTHING_TESTED, match_expected
from nonlocal_core import SPECIFICATION_VERSION, __version__
from nonlocal_core.files.regular import read_file

__all__ = ["read_expected"]

_CELL = "conformance cell"
_COLUMNS = {"passed": "passed", "failed": "failed", "xfailed": "expected failure", "skipped": "not expressible"}
_LONGEST = 5
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
    start = time.process_time()
    try:
        return (yield)
    except Unsupported as answer:
        pytest.skip(str(answer))
    finally:
        if bound is not None:
            cell = (bound.check.name, bound.driver.name, time.process_time() - start)
            item.user_properties.append((_CELL, cell))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a run fail in which everything was skipped."""
    outcomes = {outcome for outcome, *_ in _cells(session.config.pluginmanager.get_plugin("terminalreporter"))}
    if outcomes == {"skipped"} and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _cells(terminalreporter: pytest.TerminalReporter | None) -> list[tuple[str, str, str, float]]:
    """Return outcome, check, backend and seconds of all that ran, nothing in a process that reports to another."""
    return [
        (outcome, *cell)
        for outcome in _COLUMNS
        for report in (terminalreporter.stats.get(outcome, []) if terminalreporter else [])
        for name, cell in getattr(report, "user_properties", [])
        if name == _CELL
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print a table for each backend, of what came of the cases of each check, and what took the time."""
    cells, line = _cells(terminalreporter), terminalreporter.line
    for driver in config.stash[_DRIVERS][0]:
        counts = Counter((check, outcome) for outcome, check, name, _ in cells if name == driver.name)
        if not counts:
            continue
        terminalreporter.section(f"non-local conformance: cases of {driver.name}")
        line("".join([f"{'check':25}", *(f"{title:>{len(title) + 3}}" for title in _COLUMNS.values())]))
        for check in [*sorted({check for check, _ in counts}), "all"]:
            found = [sum(n for (c, o), n in counts.items() if o == of and check in {c, "all"}) for of in _COLUMNS]
            shown = zip(found, _COLUMNS.values(), strict=True)
            line("".join([f"{check:25}", *(f"{n or '-':>{len(title) + 3}}" for n, title in shown)]))
        if absent := without_case(driver):
            line(textwrap.fill(f"no case: {', '.join(absent)}", 79, subsequent_indent="  "))
    if cells:
        seconds: dict[str, float] = {}
        for _, check, _, taken in cells:
            seconds[check] = seconds.get(check, 0.0) + taken
        line(f"{sum(seconds.values()):.1f} s of processor time, most of it in:")
        for check, taken in sorted(seconds.items(), key=lambda item: -item[1])[:_LONGEST]:
            line(f"  {check:26}{taken:8.1f} s")
        if {outcome for outcome, *_ in cells} == {"skipped"}:
            line(NOTHING_TESTED, red=True)


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
