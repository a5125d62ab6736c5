"""Measure up to how many weights the matrix is faster than the method without it, for `nonlocal_core.planning`.

    python benchmarks/thresholds.py            prints a table and writes benchmarks/results/thresholds.json

Both methods are called in turn, in one process, on blocks of one sample. The limit of a backend is the largest number
of weights N x M at which, over the widths, the matrix takes less time on average; a smaller one at which it does not
ends the search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from importlib import metadata
from pathlib import Path

from asv.machine import Machine

from measuring.case import DEVICES, Case
from measuring.subject import Subject, in_turn
from nonlocal_core.planning import exact_method

FORMS = ("embedded_gaussian", "dot_product", "concatenation")
BACKENDS = ("torch", "tensorflow", "jax")
CHANNELS = (64, 256, 1024)
POSITIONS = (16, 64, 128, 256, 512, 784, 1024, 1568, 2048)
SECONDS = 0.6
RESULTS = Path(__file__).parent / "results" / "thresholds.json"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure the limits of the planner.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for each pair of calls")
    seconds = parser.parse_args().seconds
    limits: dict[str, dict[str, dict[str, object]]] = {}
    for backend in BACKENDS:
        versions = f"{backend} {metadata.version('tensorflow-cpu' if backend == 'tensorflow' else backend)}"
        found = limits.setdefault(versions, {})
        for pairwise in FORMS:
            for training in (False, True):
                ratios = {size: _ratio(backend, pairwise, training, size, seconds) for size in POSITIONS}
                faster = [size for size in POSITIONS if ratios[size] < 1]
                last = next((size for size in POSITIONS if size not in faster), None)
                kept = [size for size in faster if last is None or size < last]
                name = f"{exact_method(pairwise)}, {'training' if training else 'evaluation'}"
                limit = max(kept, default=0) ** 2
                found[name] = {"limit": limit, "matrix / other": {size: round(r, 2) for size, r in ratios.items()}}
                row = "  ".join(f"{size}: {ratio:.2f}" for size, ratio in ratios.items())
                sys.stdout.write(f"{backend:10} {name:26} {row}  limit {limit}\n")
                sys.stdout.flush()
    RESULTS.parent.mkdir(exist_ok=True)
    measured = {"device": DEVICES[0], "cpu": Machine.get_defaults()["cpu"], "channels": CHANNELS, "limits": limits}
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n")


def _ratio(backend: str, pairwise: str, training: bool, positions: int, seconds: float) -> float:
    """Return the time of the matrix over that of the other method, the mean over the widths."""
    step, ratios = "training" if training else "forward", []
    for channels in CHANNELS:
        calls = []
        for method in ("pairwise", exact_method(pairwise) or "auto"):
            case = Case(backend, DEVICES[0], pairwise, method, channels, (positions,), training=training)
            calls.append(Subject("", (), case, step).call)
        matrix, other = map(min, in_turn(calls, seconds))
        ratios.append(matrix / other)
    return statistics.geometric_mean(ratios)


if __name__ == "__main__":
    main()
