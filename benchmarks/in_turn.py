"""Compare implementations at one geometry by calls in turn: a machine that slows down slows all of them.

    python benchmarks/in_turn.py image-28 torch tensorflow jax
    python benchmarks/in_turn.py wide-14 torch pytorchvideo mmcv --training --forms embedded_gaussian
    OMP_WAIT_POLICY=passive python benchmarks/in_turn.py image-28 torch --busy 2

Prints the median time of each, and in brackets its ratio to the first that can be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator

from measuring.case import BACKENDS, DEVICES, FORMS, GEOMETRIES, Case
from measuring.subject import Subject, in_turn

_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""A process that computes for as long as the one that started it lives."""


@contextlib.contextmanager
def load_beside(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep that many other processes computing, as the loaders of a training run do."""
    started = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(processes)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("backends", nargs="+", choices=BACKENDS, metavar="backend")
    parser.add_argument("--training", action="store_true", help="a training step; else a call in evaluation")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, metavar="form")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other processes that compute meanwhile")
    parser.add_argument("--seconds", type=float, default=10, help="time for each form")
    args = parser.parse_args()
    channels, spatial = GEOMETRIES[args.geometry]
    step = "training" if args.training else "forward"
    for form in args.forms:
        subjects = []
        for backend in args.backends:
            case = Case(backend, DEVICES[0], form, "auto", channels, spatial, training=args.training)
            reason = case.impossible or case.too_large
            if reason is None:
                subjects.append(Subject("", (), case, step))
            else:
                sys.stdout.write(f"{backend}, {form}: not measured, {reason}\n")
        with load_beside(args.busy):
            times = in_turn([one.call for one in subjects], args.seconds) if subjects else []
        medians = [statistics.median(taken) for taken in times]
        row = "  ".join(
            f"{one.case.backend} {1e3 * median:.2f} ms ({median / medians[0]:.2f})"
            for one, median in zip(subjects, medians, strict=True)
        )
        if row:
            sys.stdout.write(f"{args.geometry} {step} {form}: {row}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
