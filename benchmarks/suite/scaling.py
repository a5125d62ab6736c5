"""How time and memory grow with the number of positions."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from measuring.case import BACKENDS, DEVICES, FORMS, OURS, Case, grid_of
from measuring.subject import Subject, in_turn, subject, watched

__all__ = ["CHANNELS", "POSITIONS", "Scaling", "Slope"]

CHANNELS = 64
"""C; C' is half of it."""

POSITIONS = tuple(2**power for power in (10, 12, 13, 14, 15, 16, 18))

_KEEP = "glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
"""Settings of malloc. Else it gives arrays of 32 MiB and more back to the system: most of a call is then new pages."""


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
    """The power of the number of positions with which a training step grows: 1 is linear, 2 quadratic.

    It is fitted to a number of positions, a quarter and a sixteenth of it. Times are of calls in turn; memory is of one
    process for each size.
    """

    params = (tuple(OURS), DEVICES, FORMS[::-1], (POSITIONS[-1], POSITIONS[-3]))
    param_names = ("backend", "device", "pairwise", "positions")

    def setup(self, *params: Any) -> None:
        """Refuse what cannot be measured."""
        watched("scaling.Slope", params, self.case(*params))

    @staticmethod
    def case(backend: str, device: str, pairwise: str, positions: int) -> Case:
        """Return what the parameters mean at one number of positions."""
        return Scaling.case(backend, device, pairwise, "training", positions)

    def track_time(self, *params: Any) -> float:
        """The power of the time where the process keeps its memory from call to call."""
        subjects = self.subjects(*params)
        os.environ["GLIBC_TUNABLES"] = _KEEP
        return _slope(subjects, _in_process("spawn", _medians, subjects))

    def track_memory(self, *params: Any) -> float:
        """The power of the peak memory."""
        subjects = self.subjects(*params)
        return _slope(subjects, [_in_process("fork", Subject.peak, one) for one in subjects])

    def subjects(self, *params: Any) -> list[Subject]:
        """Return what is measured, one for each size."""
        backend, device, pairwise, largest = params
        cases = [self.case(backend, device, pairwise, largest // part) for part in (16, 4, 1)]
        return [Subject("scaling.Slope", params, case, "training") for case in cases]

    track_time.unit = track_memory.unit = "power"  # type: ignore[attr-defined]


def _medians(subjects: list[Subject]) -> list[float]:
    return [float(np.median(times)) for times in in_turn([one.run for one in subjects], 20)]


def _slope(subjects: list[Subject], found: list[Any]) -> float:
    """Return the slope of what is found against the number of positions, both as logarithms."""
    return float(np.polyfit(np.log([one.case.positions for one in subjects]), np.log(found), 1)[0])


def _in_process(start: str, measure: Callable[[Any], Any], argument: Any) -> Any:
    """Return what is measured in a new process, which is begun as `start` says."""
    with multiprocessing.get_context(start).Pool(1) as pool:
        return pool.apply(measure, (argument,))
