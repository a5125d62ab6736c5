"""What benchmarks tell the program that runs them: that one begins, and why one gives no number."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

__all__ = ["JOURNAL", "begin", "note"]

JOURNAL = "NONLOCAL_BENCH_JOURNAL"
"""The environment variable that names the file, if there is one."""


@functools.cache
def begin(benchmark: str, params: tuple[object, ...]) -> None:
    """Say, once in a process, that a benchmark begins."""
    _write(benchmark, params, None)


def note(benchmark: str, params: tuple[object, ...], text: str) -> None:
    """Say why a benchmark gives no number."""
    _write(benchmark, params, text)


def _write(benchmark: str, params: tuple[object, ...], text: str | None) -> None:
    path = os.environ.get(JOURNAL)
    if path is not None:
        line = json.dumps({"benchmark": benchmark, "params": [repr(param) for param in params], "note": text})
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
