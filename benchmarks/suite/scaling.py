"""How time and memory grow with the number of positions."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np

from measuring.case import BACKENDS, DEVICES, FORMS, OURS, Case, grid_of
from measuring.subject import Subject, subject, watched

__all__ = ["CHANNELS", "POSITIONS", "Scaling", "Slope"]

CHANNELS = 64
"""C; C' is half of it."""

POSITIONS = tuple(2**power for power in (10, 12, 13, 14, 15, 16, 18))

_SLOPES = {False: (16384, 65536, 262144), True: (8192, 16384, 32768)}
"""The positions to which a slope is fitted, for the forms without and with a softmax."""


class Scaling:
    """A call or a training step at 1,024 to 262,144 positions of 64 channels."""

    params = (BACKENDS, DEVICES, FORMS, ("training", "forward"), POSITIONS)
    param_names = ("backend", "device", "pairwise", "step", "positions")
    rounds, number, min_run_count, repeat = 1, 1, 2, (1, 10, 3.0)

    def setup(self, *params: Any) -> None:
        """Take the case; refuse what cannot be measured."""
        self.subject = subject("scaling.Scaling", params, self.case(*params), params[3])

    @staticmethod
    def case(backend: str, device: str, pairwise: str, step: str, positions: int) -> Case:
        """Return what the parameters mean."""
        return Case(backend, device, pairwise, "auto", CHANNELS, grid_of(positions), training=step == "training")

    def time_positions(self, *_: Any) -> None:
        """Seconds of one call."""
        self.subject.run()

    def track_memory(self, *_: Any) -> int | None:
        """Peak memory of one call beside what is held before it, its results among it."""
        return self.subject.peak()

    track_memory.unit = "bytes"  # type: ignore[attr-defined]


class Slope:
    """The power of the number of positions with which a training step grows, fitted to three sizes.

    1 is linear, 2 quadratic. The forms with a softmax are measured at 8,192 to 32,768 positions, the others at
    16,384 to 262,144, each size in a process of its own.
    """

    params = (tuple(OURS), DEVICES, FORMS)
    param_names = ("backend", "device", "pairwise")

    def setup(self, *params: str) -> None:
        """Refuse what cannot be measured."""
        watched("scaling.Slope", params, self.case(*params))

    @staticmethod
    def case(*params: str, positions: int = POSITIONS[0]) -> Case:
        """Return what the parameters mean at one number of positions."""
        backend, device, pairwise = params
        return Scaling.case(backend, device, pairwise, "training", positions)

    def track_time(self, *params: str) -> float:
        """The power of the time."""
        return _slope(params, Subject.seconds)

    def track_memory(self, *params: str) -> float:
        """The power of the peak memory."""
        return _slope(params, Subject.peak)

    track_time.unit = track_memory.unit = "power"  # type: ignore[attr-defined]


def _slope(params: tuple[str, ...], measure: Callable[[Subject], Any]) -> float:
    """Return the slope of what is measured against the number of positions, both as logarithms."""
    sizes = _SLOPES["gaussian" in params[2]]
    cases = [Slope.case(*params, positions=size) for size in sizes]
    found = [_apart(measure, Subject("scaling.Slope", params, case, "training")) for case in cases]
    return float(np.polyfit(np.log(sizes), np.log(found), 1)[0])


def _apart(measure: Callable[[Subject], Any], one: Subject) -> Any:
    """Return what is measured in a new process, in which no framework has been imported."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (one,))
