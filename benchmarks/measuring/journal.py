"""What benchmarks tell the program that runs them: that one begins, and why one gives no number."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["JOURNAL", "begin", "note", "write"]

JOURNAL = "NONLOCAL_BENCH_JOURNAL"
"""The environment variable that names the file, if there is one."""


@functools.cache
def begin(benchmark: str, params: tuple[object, ...]) -> None:
    """Say, once in a process, that a benchmark begins."""
    write({"benchmark": benchmark, "params": [repr(param) for param in params], "note": None})


def note(benchmark: str, params: tuple[object, ...], text: str) -> None:
    """Say why a benchmark gives no number."""
    write({"benchmark": benchmark, "params": [repr(param) for param in params], "note": text})


def write(line: Mapping[str, object]) -> None:
    """Add a line to the file, if there is one."""
    path = os.environ.get(JOURNAL)
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
