"""The page of the documentation: what each check of the suite finds, with the command that repeats it."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nonlocal_conformance import CHECKS, Result, run_checks
from nonlocal_conformance.capabilities import CAPABILITIES
from nonlocal_core import SPECIFICATION_VERSION
from nonlocal_core.spec.options import PAIRWISE
from peers import SUBJECTS, load

__all__ = ["page"]

HEAD, WIDTH = 130, 119
"""How much of a message is shown, and how long a line of text is."""

SAME = frozenset({"methods"})
"""Checks that are left out: with one method, it is the check `forward` again."""

ABSENT = "What the drivers have no method for is not run: "

WORDS = {"passed": "passes", "failed": "fails", "unsupported": "cannot express"}

INTRODUCTION = """# Other implementations under the conformance suite

<!-- Written by `make peers`. -->

The suite of this project, run on implementations of the non-local block that install from PyPI. Each is compared with
the reference at its own options: what counts as right here is the block that the implementation sets out to be, as its
preset describes it (`nonlocal_core.spec.presets`), not the defaults of this project. Specification {version}, PyTorch
{torch}, on the CPU.

`make peers` installs the packages and writes this page. The command beside a row repeats that row; it is given in the
root of the checkout, after

```sh
export PYTHONPATH=conformance PATH="$PWD/.venv/bin:$PATH"
```

A cell says *passes* or *fails* where all cases do, and otherwise how many; it is empty where a check has no case.
*Cannot express*: the implementation has no option for the case, as its driver in `conformance/peers` says.

{absent}

## Overview

{overview}
## The checks

{checks}"""

GLUONCV = '`pip install --no-deps gluoncv==0.10.5.post0 && python -c "import gluoncv"`'

NOT_RUN = f"""
## Not run

| package | why | command |
| --- | --- | --- |
| gluoncv 0.10.5.post0 | its import raises an error where PyTorch is 2.0 or newer | {GLUONCV} |
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A driver with its address and what came of the checks."""

    address: str
    driver: Any
    results: Sequence[Result]

    def form(self, result: Result) -> str:
        """Return the pairwise form of the case of a result."""
        name = result.id.split("-")[1]
        return next(str(case.options["pairwise"]) for case in self.driver.cases if case.name == name)

    def outcomes(self, outcome: str) -> list[Result]:
        """Return the results with one outcome."""
        return [result for result in self.results if result.outcome == outcome]

    def command(self, *parts: str) -> str:
        """Return the command that runs the checks whose ids begin with these parts."""
        return f"`nonlocal conformance {self.address} -- -k {'-'.join([self.driver.name, *parts])}`"


def page() -> str:
    """Run the suite on every subject and return the page, in Markdown."""
    subjects = [_run(address) for address in SUBJECTS]
    offered = frozenset().union(*(subject.driver.capabilities for subject in subjects))
    absent = [CAPABILITIES[name] for name in sorted(CAPABILITIES.keys() - offered)]
    introduction = INTRODUCTION.format(
        version=SPECIFICATION_VERSION,
        torch=torch.__version__,
        absent=textwrap.fill(f"{ABSENT}{'; '.join(['key masks', *absent])}.", WIDTH),
        overview=_overview(subjects),
        checks=_checks(subjects),
    )
    return "".join([introduction, *map(_section, subjects), NOT_RUN])


def _run(address: str) -> Subject:
    sys.stderr.write(f"{address}\n")
    driver = load(address)
    results = [result for result in run_checks(driver, on_failure="return") if result.check not in SAME]
    return Subject(address, driver, results)


def _overview(subjects: Sequence[Subject]) -> str:
    rows = []
    for subject in subjects:
        forms = [form for form in PAIRWISE if any(subject.form(one) == form for one in subject.outcomes("passed"))]
        failures: dict[str, set[str]] = {}
        for result in subject.outcomes("failed"):
            failures.setdefault(result.check, set()).add(subject.form(result))
        fails = [
            f"`{check}`" if failed >= set(forms) else f"`{check}` ({', '.join(f for f in forms if f in failed)})"
            for check, failed in failures.items()
        ]
        driver = subject.driver
        cells = (driver.__doc__.rstrip("."), f"{driver.package} {driver.version}", ", ".join(forms), ", ".join(fails))
        rows.append(cells)
    return _table(("implementation", "package", "forms", "checks that fail, and for which forms if not for all"), rows)


def _checks(subjects: Sequence[Subject]) -> str:
    ran = {result.check for subject in subjects for result in subject.results}
    rows = [(f"`{name}`", " ".join(str(one.run.__doc__).split())) for name, one in CHECKS.items() if name in ran]
    return _table(("check", "what must hold"), rows)


def _section(subject: Subject) -> str:
    driver = subject.driver
    title = f"\n## {driver.package} {driver.version}: {driver.__doc__.rstrip('.')}\n\n"
    return title + _outcomes(subject) + _failures(subject) + _limits(subject)


def _outcomes(subject: Subject) -> str:
    """Return the table of check by form, without the forms that the implementation lacks."""
    forms = [form for form in PAIRWISE if any(subject.form(one) == form for one in subject.outcomes("passed"))]
    rows = []
    for check in dict.fromkeys(result.check for result in subject.results):
        own = [result for result in subject.results if result.check == check]
        cells = [_cell(result for result in own if subject.form(result) == form) for form in forms]
        if any(cells):
            rows.append((f"`{check}`", *cells, subject.command(check, "")))
    return _table(("check", *forms, "command"), rows)


def _cell(results: Iterable[Result]) -> str:
    counts = Counter(result.outcome for result in results)
    if len(counts) == 1:
        return WORDS[next(iter(counts))]
    return ", ".join(f"{word}: {counts[outcome]}" for outcome, word in WORDS.items() if outcome in counts)


def _failures(subject: Subject) -> str:
    """Return the table of failures, with the first message of each check and form, or nothing."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in subject.outcomes("failed"):
        groups.setdefault((result.check, subject.form(result)), []).append(result)
    rows = [
        (f"`{check}`", form, str(len(group)), _head(group[0].message), subject.command(check, f"{form}_"))
        for (check, form), group in groups.items()
    ]
    return f"\nWhat fails:\n\n{_table(('check', 'form', 'cases', 'message', 'command'), rows)}" if rows else ""


def _limits(subject: Subject) -> str:
    """Return the table of what cannot be expressed, with the first case of each reason, or nothing."""
    groups: dict[str, list[Result]] = {}
    for result in subject.outcomes("unsupported"):
        groups.setdefault(result.message, []).append(result)
    rows = [
        (_head(reason), str(len(group)), subject.command(*group[0].id.split("-")[:2], ""))
        for reason, group in groups.items()
    ]
    return f"\nWhat it cannot express:\n\n{_table(('reason', 'cases', 'command for the first'), rows)}" if rows else ""


def _head(message: str) -> str:
    line = " ".join(message.split()).replace("|", "\\|")
    return line if len(line) <= HEAD else f"{line[:HEAD].rstrip()} ..."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
