"""What `thresholds.py --device cuda` does: time each way of computing a block, and read off the planner's tables.

On a GPU the width of the operands and their dtype decide as much as the number of weights does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measuring.case import Case
from measuring.machine import version_of
from measuring.subject import Subject, in_turn
from nonlocal_core import planning
from nonlocal_core.files.atomic_write import replace_file

__all__ = ["measure", "tables"]

BATCH = 4
DTYPES = ("bfloat16", "float32")
WIDTHS = (64, 128, 256, 512)
POSITIONS = (256, 512, 1024, 2048, 4096, 8192)
QUICK = (4, 8), (8, 16)
"""The widths and the positions where only the way through is tried."""

NOISE = 1.03
"""A ratio below is taken for noise."""

Row = dict[str, Any]
"""Its backend, form, step, dtype, width and positions, and `times`: seconds by way, or why there are none."""


def measure(
    device: str, name: str, file: Path, backends: Sequence[str], forms: Sequence[str], seconds: float, *, quick: bool
) -> None:
    """Measure, print, and write after each row, beside what else the file has of this device and of these versions.

    Args:
        device: "cpu" or "cuda".
        name: what the device is.
        file: where to write.
        backends: some of "torch", "tensorflow" and "jax".
        forms: some of the forms.
        seconds: the time for the calls of a row.
        quick: whether the sizes are tiny.
    """
    widths, positions = QUICK if quick else (WIDTHS, POSITIONS)
    dtypes = DTYPES[1:] if quick else DTYPES
    rows = _earlier(file, name, {backend: version_of(backend) for backend in backends})
    for backend, form, training, dtype, width, size in itertools.product(
        backends, forms, (True, False), dtypes, widths, positions
    ):
        case = Case(backend, device, form, "auto", 2 * width, (size,), dtype, training, BATCH)
        row = {
            "backend": backend,
            "form": form,
            "training": training,
            "dtype": dtype,
            "width": width,
            "positions": size,
        }
        times = times_of(case, seconds)
        rows = [one for one in rows if {**one, **row} != one]
        rows.append({**row, "version": version_of(backend), "times": times})
        shown = "  ".join(
            f"{way} {1e3 * found:.3f}" if isinstance(found, float) else f"{way}: {found}"
            for way, found in times.items()
        )
        step = "training" if training else "evaluation"
        sys.stdout.write(f"{backend:10} {form:18} {step:10} {dtype:8} {width:4} {size:6}  {shown}\n")
        sys.stdout.flush()
        whole = {"device": name, "batch": BATCH, "tables": tables(rows), "rows": rows}
        replace_file(file, f"{json.dumps(whole)}\n".encode())
    sys.stdout.write(f"{json.dumps(tables(rows), indent=1)}\n")


def times_of(case: Case, seconds: float) -> dict[str, float | str]:
    """Return the least time of each way, all called in turn, or why there is none."""
    found: dict[str, float | str] = {}
    calls: dict[str, Callable[[], Any]] = {}
    exact = str(planning.exact_method(case.pairwise))
    streamed = ("fused", "chunks") if _place(case) in planning.FUSED else ("chunks",)
    for way in ("auto", "matrix", *(streamed if exact == "streamed" else (exact,))):
        try:
            calls[way] = call_of(case, way)
            calls[way]()
        except Exception as error:  # noqa: BLE001 - a kernel that does not serve the width, or too little memory
            calls.pop(way, None)
            found[way] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.80}"
    return found | dict(zip(calls, map(min, in_turn(list(calls.values()), seconds)), strict=True))


def call_of(case: Case, way: str) -> Callable[[], Any]:
    """Return the call of a block in which the planner has no choice."""
    method = {"matrix": "pairwise", "fused": "streamed", "chunks": "streamed"}.get(way, way)
    widest = {"fused": math.inf, "chunks": 0}.get(way)
    forced = {} if widest is None else {_place(case): dict.fromkeys(("float32", "bfloat16", "float16"), widest)}
    with patch.dict(planning.FUSED, forced):
        call = Subject(
            "", (), dataclasses.replace(case, method=method), "training" if case.training else "forward"
        ).call

    def run() -> Any:
        with patch.dict(planning.FUSED, forced):
            return call()

    return run if forced else call


def tables(rows: Iterable[Row]) -> dict[str, Any]:
    """Return what the tables of the planner would be by these rows: FUSED, AHEAD, LIMITS and WIDE, by backend.

    FUSED and AHEAD are the largest width, by dtype, up to which the framework's fused attention takes no more time than
    chunks of queries and than the matrix. LIMITS and WIDE are the most weights up to which the matrix takes less time
    than what would be taken else, where no fused attention is ahead: up to `planning.WIDTH`, and beyond it.
    """
    found: dict[str, Any] = {}
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        softmax = [row for row in own if planning.exact_method(row["form"]) == "streamed"]
        dtypes = dict.fromkeys(row["dtype"] for row in softmax)
        fused, ahead = (
            {dtype: _widest([row for row in softmax if row["dtype"] == dtype], than) for dtype in dtypes}
            for than in ("chunks", "matrix")
        )
        limits: dict[str, int] = {}
        wide: list[int] = []
        for form, training in dict.fromkeys((row["form"], row["training"]) for row in own):
            rest = [
                row
                for row in own
                if (row["form"], row["training"]) == (form, training)
                and not (row in softmax and row["width"] <= ahead[row["dtype"]])
            ]
            narrow = [row for row in rest if row["width"] <= planning.WIDTH]
            method = planning.exact_method(form)
            limits[f"{method}, {'training' if training else 'evaluation'}"] = _most_weights(narrow)
            if method == "streamed":
                wide.append(_most_weights([row for row in rest if row["width"] > planning.WIDTH]))
        found[backend] = {"FUSED": fused, "AHEAD": ahead, "LIMITS": limits, "WIDE": min(wide, default=0)}
    return found


def _earlier(file: Path, name: str, versions: Mapping[str, str]) -> list[Row]:
    """Return the rows of a file that are of this device, and of no other version of what is measured now."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = found["rows"] if found.get("device") == name else []
    return [row for row in rows if versions.get(row["backend"], row["version"]) == row["version"]]


def _place(case: Case) -> tuple[str, str]:
    return case.backend, "gpu" if case.device == "cuda" else case.device


def _widest(rows: Sequence[Row], than: str) -> int:
    """Return the largest width up to which fused attention takes no more time than another way, on average."""
    widest = 0
    for width in sorted({row["width"] for row in rows}):
        ratio = _ratio([row for row in rows if row["width"] == width], ["fused"], [than])
        if ratio is None or ratio > NOISE:
            break
        widest = width
    return widest


def _most_weights(rows: Sequence[Row]) -> int:
    """Return the most weights up to which the matrix is the faster, on average over widths and dtypes."""
    most = 0
    for size in sorted({row["positions"] for row in rows}):
        others = ["fused", "chunks", "reassociated", "sorted"]
        ratio = _ratio([row for row in rows if row["positions"] == size], ["matrix"], others)
        if ratio is None or ratio >= 1:
            break
        most = BATCH * size**2
    return most


def _ratio(rows: Iterable[Row], ways: Sequence[str], others: Sequence[str]) -> float | None:
    """Return the mean ratio of the fastest of some ways to that of others; None: no row has both."""
    pairs = [[[row["times"].get(way) for way in among] for among in (ways, others)] for row in rows]
    least = [[min((one for one in times if isinstance(one, float)), default=None) for times in pair] for pair in pairs]
    ratios = [first / second for first, second in least if first and second]
    return statistics.geometric_mean(ratios) if ratios else None
