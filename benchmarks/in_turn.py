"""Compare implementations at one geometry by calls in turn: a machine that slows down slows all of them.

    python benchmarks/in_turn.py image-28 torch tensorflow jax
    python benchmarks/in_turn.py wide-14 torch pytorchvideo mmcv --training --forms embedded_gaussian

Prints the median time of each, and in brackets its ratio to the first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib import import_module

from measuring.case import BACKENDS, DEVICES, FORMS, GEOMETRIES, Case


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("backends", nargs="+", choices=BACKENDS, metavar="backend")
    parser.add_argument("--training", action="store_true", help="a training step; else a call in evaluation")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS[:1] + FORMS[2:], metavar="form")
    parser.add_argument("--seconds", type=float, default=10, help="time for each form")
    args = parser.parse_args()
    channels, spatial = GEOMETRIES[args.geometry]
    step = "training" if args.training else "forward"
    for form in args.forms:
        cases = [Case(b, DEVICES[0], form, "auto", channels, spatial, training=args.training) for b in args.backends]
        calls = {
            case.backend: getattr(import_module(f"measuring.on_{case.library}"), step)(case)
            for case in cases
            if case.impossible is None
        }
        times: dict[str, list[float]] = {backend: [] for backend in calls}
        for call in calls.values():
            call()
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end:
            for backend, call in calls.items():
                start = time.perf_counter()
                call()
                times[backend].append(time.perf_counter() - start)
        medians = {backend: statistics.median(taken) for backend, taken in times.items()}
        first = next(iter(medians.values()))
        row = "  ".join(f"{backend} {1e3 * t:.2f} ms ({t / first:.2f})" for backend, t in medians.items())
        sys.stdout.write(f"{args.geometry} {step} {form}: {row}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
