"""What the demo measures: time, memory, and the difference from the reference; needs the extra "demo"."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

__all__ = ["NOTE", "REFERENCE", "SAMPLE", "Row", "measured", "table_of"]

Array = np.ndarray[Any, Any]
Operands = tuple[Array, Array, Array]

NOTE = (
    "Seconds: the second run of a framework, with the copies to its device and back, and the only run of the "
    "reference. Difference: the largest from the reference{}. Memory: the peak of the first run, beyond what "
    "was held before."
)

REFERENCE = "numpy"

SAMPLE = 1000
"""The number of pixels at which the reference computes when its own picture is not asked for."""

_STEPS = 100
"""The number of chunks of queries in which the reference computes, for its progress bar."""

_CHUNK = 2**26
"""The largest number of weights that are asked at once of a framework that may hold them as a matrix."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to denoise and what was measured of it; None is shown as a dash."""

    name: str
    device: str
    seconds: float
    psnr: float | None = None
    difference: float | None = None
    memory: int | None = None


def measured(
    reference: Any, frameworks: Sequence[Any], operands: Operands, *, whole: bool, console: Any
) -> list[tuple[Array, Row]]:
    """Run the reference and the frameworks.

    Args:
        reference: its driver.
        frameworks: their drivers.
        operands: theta, phi and g.
        whole: whether the reference computes every pixel and is a row of its own, or only some, to compare.
        console: for progress.

    Returns:
        For each its picture `(H W, C)` and its row, without the PSNR.
    """
    pixels = np.arange(operands[0].shape[1])
    if not whole:
        pixels = np.sort(np.random.default_rng(0).permutation(pixels)[:SAMPLE])
    y, row = run_reference(reference, operands, pixels, console)
    results = [run_framework(driver, operands, y, pixels, console) for driver in frameworks]
    return [(y, row), *results] if whole else results


def run_reference(driver: Any, operands: Operands, pixels: Array, console: Any) -> tuple[Array, Row]:
    """Return the reference at some pixels `(len(pixels), C)`, and its row without the PSNR."""
    chunks = np.array_split(pixels, min(_STEPS, len(pixels)))
    title = f"{driver.name} (the reference), {len(pixels):,} pixels"
    start = time.perf_counter()
    y, memory = driver.peak_memory(lambda: _in_chunks(driver, operands, chunks, title, console))
    return y, Row(driver.name, driver.device, time.perf_counter() - start, memory=memory)


def run_framework(driver: Any, operands: Operands, reference: Array, pixels: Array, console: Any) -> tuple[Array, Row]:
    """Return a framework's result at every pixel `(H W, C)`, and its row without the PSNR."""
    dtype = "float32" if "float32" in driver.dtypes else driver.dtypes[0]
    narrow = tuple(array.astype(dtype) for array in operands)
    count = narrow[0].shape[1]
    # A driver with this capability also promises that softmax forms do without the matrix of weights.
    measures = "peak_memory" in driver.capabilities
    step = count if measures else max(1, _CHUNK // count)
    chunks = np.array_split(np.arange(count), math.ceil(count / step))
    call = partial(_in_chunks, driver, narrow, chunks, f"{driver.name} {driver.version}", console)
    _, memory = driver.peak_memory(call) if measures else (call(), None)
    start = time.perf_counter()
    y = call()
    seconds = time.perf_counter() - start
    difference = float(np.abs(y[pixels] - reference).max())
    return y, Row(driver.name, driver.device, seconds, difference=difference, memory=memory)


def _in_chunks(driver: Any, operands: Any, chunks: Sequence[Array], title: str, console: Any) -> Array:
    """Return the result for chunks of queries, which are independent, in float64."""
    from rich.progress import track

    theta, phi, g = operands
    progress = track(chunks, description=title, console=console, transient=True)
    results = [driver.op(theta[:, block], phi, g) for block in progress]
    y: Array = np.concatenate(results, axis=1)[0].astype(np.float64)
    return y


def table_of(rows: Sequence[Row]) -> Any:
    """Return the table of the rows, for a console of rich."""
    from rich.table import Table

    table = Table()
    table.add_column("Backend")
    table.add_column("Device")
    for title in ("Seconds", "PSNR", "Difference", "Memory"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.device,
            f"{row.seconds:.2f}",
            _shown("{:.2f} dB", row.psnr),
            _shown("{:.1e}", row.difference),
            _shown("{:,.0f} MiB", None if row.memory is None else row.memory / 2**20),
        )
    return table


def _shown(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)
