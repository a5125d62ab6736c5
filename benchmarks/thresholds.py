"""Measure up to how many weights the matrix is faster than the method without it, for `nonlocal_core.planning`.

    python benchmarks/thresholds.py                  prints a table and writes benchmarks/results/thresholds.json
    python benchmarks/thresholds.py --device cuda    by width and dtype: benchmarks/results/thresholds-<device>.json

Both methods are called in turn, in one process, on blocks of one sample. The limit of a backend is the largest number
of weights N x M at which, over the widths, the matrix takes less time on average; a smaller one at which it does not
ends the search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import by_width
from measuring.case import DEVICES, Case
from measuring.machine import gpu_name, slug, version_of
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the calls that are compared")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICES[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, metavar="NAME")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, metavar="FORM")
    parser.add_argument("--quick", action="store_true", help="tiny sizes by width and dtype, to see that it works")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where results by width and dtype are written")
    args = parser.parse_args()
    if args.device == "cuda" or args.quick:
        name = gpu_name() if args.device == "cuda" else args.device
        file = args.output or RESULTS.with_name(f"thresholds-{slug(name)}.json")
        by_width.measure(args.device, name, file, args.backends, args.forms, args.seconds, quick=args.quick)
    else:
        measure(args.backends, args.forms, args.seconds)


def measure(backends: Sequence[str], forms: Sequence[str], seconds: float) -> None:
    """Measure on a CPU; what is written are the limits of all that is named."""
    from asv.machine import Machine

    limits: dict[str, dict[str, dict[str, object]]] = {}
    for backend in backends:
        versions = f"{backend} {version_of(backend)}"
        found = limits.setdefault(versions, {})
        for pairwise in forms:
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
    measured = {"device": "cpu", "cpu": Machine.get_defaults()["cpu"], "channels": CHANNELS, "limits": limits}
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n")


def _ratio(backend: str, pairwise: str, training: bool, positions: int, seconds: float) -> float:
    """Return the time of the matrix over that of the other method, the mean over the widths."""
    step, ratios = "training" if training else "forward", []
    for channels in CHANNELS:
        calls = []
        for method in ("pairwise", exact_method(pairwise) or "auto"):
            case = Case(backend, "cpu", pairwise, method, channels, (positions,), training=training)
            calls.append(Subject("", (), case, step).call)
        matrix, other = map(min, in_turn(calls, seconds))
        ratios.append(matrix / other)
    return statistics.geometric_mean(ratios)


if __name__ == "__main__":
    main()
