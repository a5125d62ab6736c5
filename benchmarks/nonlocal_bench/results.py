"""The results of the benchmarks, as asv writes them, with the notes that `make bench` adds."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nonlocal_core.arguments import read_json
from nonlocal_core.errors import shortened
from nonlocal_core.files.regular import read_file

__all__ = ["MALFORMED", "Measurement", "Run", "load"]


MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError)
"""What becomes of results that have another form than those of asv, beside a `ValueError`."""

_MOST = 100_000
"""How many combinations of parameters a file has at most: asv writes those that were not measured too."""

_LONGEST = 100
"""How many characters a parameter has at most."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number, or why there is none.

    Args:
        benchmark: the name, such as "training.Training.time_step".
        params: its parameters by their names.
        value: in seconds, bytes or the unit of the benchmark; None: it failed.
        note: why it failed, if that is known.
    """

    benchmark: str
    params: Mapping[str, Any]
    value: float | None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """The results of one commit on one machine.

    Args:
        commit: its hash.
        date: when it was made, in seconds since 1970.
        machine: what the machine is, by the names of asv.
        versions: those of the frameworks.
        measurements: what was measured.
    """

    commit: str
    date: float
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    measurements: tuple[Measurement, ...]

    def of(self, benchmark: str) -> list[Measurement]:
        """Return the measurements of one benchmark."""
        return [one for one in self.measurements if one.benchmark == benchmark]


def load(folder: Path, machine: str | None = None, commit: str | None = None) -> Run:
    """Return the results of the newest commit that has any.

    Args:
        folder: where asv keeps results.
        machine: the name of the machine, or a pattern such as "*cpu". None: any.
        commit: how the hash of the commit begins. None: any.

    Returns:
        The run; what was not measured is left out.

    Raises:
        ValueError: if there are no such results, or a file of theirs cannot be understood.

    Example:
        >>> load(Path("no_such_folder"))
        Traceback (most recent call last):
        ValueError: no results in 'no_such_folder'
    """
    try:
        about = _read(folder / "benchmarks.json")
        files = [path for path in folder.glob(f"{machine or '*'}/*.json") if path.name != "machine.json"]
        runs = [_run(path, about) for path in files if path.name.startswith(commit or "")]
    except FileNotFoundError:
        runs = []
    except (ValueError, *MALFORMED) as error:
        message = f"results in {str(folder)!r} that asv did not write: {shortened(str(error))}"
        raise ValueError(message) from error
    if not runs:
        of = "".join(f" of {kind} {name!r}" for kind, name in (("machine", machine), ("commit", commit)) if name)
        message = f"no results{of} in {str(folder)!r}"
        raise ValueError(message)
    return max(runs, key=lambda run: run.date)


def _read(path: Path) -> Any:
    return read_json(read_file(path).decode())


def _run(path: Path, about: Mapping[str, Any]) -> Run:
    data = _read(path)
    machine = {name: value for name, value in data["params"].items() if name not in data["requirements"]}
    count = sum(math.prod(map(len, columns[1])) for columns in data["results"].values())
    if count > _MOST:
        message = f"{count} combinations of parameters"
        raise ValueError(message)
    measurements = [
        one
        for name, columns in data["results"].items()
        if name in about
        for one in _measurements(name, columns, about[name]["param_names"], data.get("notes", {}))
    ]
    return Run(data["commit_hash"], data["date"] / 1000, machine, data["requirements"], tuple(measurements))


def _measurements(name: str, columns: Any, names: Any, notes: Any) -> list[Measurement]:
    """Return the measurements of one benchmark; a number that is none was not measured."""
    values, axes = columns[:2]
    count = math.prod(map(len, axes))
    meanings = {text: _meaning(text) for text in itertools.chain(*axes)}
    known = notes.get(name.rpartition(".")[0], {})
    found = []
    for params, value in zip(itertools.product(*axes), values or [None] * count, strict=True):
        if value is None or not math.isnan(value):
            meant = dict(zip(names, (meanings[text] for text in params), strict=True))
            note = known.get(", ".join(params)) if value is None else None
            found.append(Measurement(name, meant, value, note))
    return found


def _meaning(text: str) -> Any:
    """Return the value of a parameter, which asv writes as Python would."""
    if len(text) > _LONGEST:
        message = f"a parameter of {len(text)} characters"
        raise ValueError(message)
    return ast.literal_eval(text)
