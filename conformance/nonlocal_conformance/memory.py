"""How much memory a call needs beyond what the process holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["peak_resident"]

T = TypeVar("T")


def peak_resident(call: Callable[[], T]) -> tuple[T, int | None]:
    """Return the result of `call` and by how many bytes the resident set grew at its peak.

    Only Linux tells the peak of a span of time; elsewhere the second value is None. Below about a megabyte
    the pages that the allocator keeps hide the answer.
    """
    gc.collect()  # what is given back meanwhile would hide what the call takes
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5", encoding="ascii")
    except OSError:
        return call(), None
    before = _kilobytes(status, "VmRSS")
    result = call()
    return result, 1024 * max(0, _kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, field: str) -> int:
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
