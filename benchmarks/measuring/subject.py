"""One case in one process: made once, guarded against too little memory and time, called and measured."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nonlocal_conformance.memory import peak_resident

from . import journal
from .case import Case, free_memory

__all__ = ["LIMIT", "Subject", "in_turn", "median_seconds", "subject", "watched"]

LIMIT = "NONLOCAL_BENCH_LIMIT"
"""The environment variable with the seconds that one benchmark of one case may take."""

_OUT_OF_MEMORY = ("out of memory", "alloc_failed", "allocate memory", "resource_exhausted", "oom when allocating")
"""What the frameworks say, in small letters."""


class Subject:
    """A case, what is done with it, and the benchmark in whose name that is.

    Args:
        benchmark: the name of the class of the benchmark.
        params: its parameters.
        case: what they mean.
        step: "forward", "training" or "rows".
    """

    def __init__(self, benchmark: str, params: tuple[object, ...], case: Case, step: str) -> None:
        """Take what there is to do; nothing is made yet."""
        self.benchmark, self.params, self.case, self.step = benchmark, params, case, step

    @functools.cached_property
    def library(self) -> Any:
        """The module that calls the framework."""
        return importlib.import_module(f".on_{self.case.library}", __package__)

    @functools.cached_property
    def call(self) -> Callable[[], Any]:
        """The call, made for arrays of this size and compiled, but not called yet."""
        return self._make(self.case)

    def run(self) -> Any:
        """Call it and wait for the result."""
        try:
            return self.call()
        except Exception as error:
            if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
                journal.note(self.benchmark, self.params, "out of memory")
            raise

    def peak(self) -> int | None:
        """Return how many bytes the first call at this size takes at its peak, its results among them.

        On a CPU that is by how much the resident set grows, after a call on a few positions in which the library
        starts its threads.
        """
        if self.case.device != "cpu":
            if self.case.mode == "graph":  # it takes its memory when it is recorded
                return int(self.library.peak(self.case, self._recorded))
            self.run()
            held: int | None = self.library.peak(self.case, self.call)
            return held
        self._make(self.case.tiny())()
        _ = self.call
        return peak_resident(self.run)[1]

    def _recorded(self) -> None:
        for _ in range(3):
            self.run()

    def seconds(self, budget: float = 2.0) -> float:
        """Return the median time of a call, by the clock of a GPU if it has one, after a first that does not count."""
        self.run()
        clock = getattr(self.library, "seconds", _wall) if self.case.device == "cuda" else _wall
        return median_seconds(self.call, budget, clock)

    def _make(self, case: Case) -> Callable[[], Any]:
        call: Callable[[], Any] = getattr(self.library, self.step)(case)
        return call


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], Any], budget: float, clock: Callable[[Any], float] = _wall) -> float:
    """Return the median time of calls that together take about `budget` seconds: at least 1, at most 50."""
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < 50):  # noqa: PLR2004 - said above
        times.append(clock(call))
    return float(np.median(times))


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Return the times of each call, all called in turn for that long, after a first one each that does not count."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times


@functools.lru_cache(maxsize=1)
def subject(benchmark: str, params: tuple[object, ...], case: Case, step: str) -> Subject:
    """Return the subject of a benchmark, always the same one, in a process that is watched.

    Raises:
        SkipNotImplemented: if there is nothing to measure.
        MemoryError: if it is known beforehand that the memory does not suffice.
    """
    watched(benchmark, params, case)
    if case.too_large is not None:
        journal.note(benchmark, params, case.too_large)
        raise MemoryError(case.too_large)
    if case.device == "cpu":  # rather an error than a process that the system ends
        resource.setrlimit(resource.RLIMIT_DATA, (int(free_memory()), resource.RLIM_INFINITY))
    return Subject(benchmark, params, case, step)


@functools.lru_cache(maxsize=1)
def watched(benchmark: str, params: tuple[object, ...], case: Case) -> None:
    """Begin a benchmark, and end its process when its time is over.

    Raises:
        SkipNotImplemented: if there is nothing to measure.
    """
    from asv_runner.benchmarks.mark import SkipNotImplemented

    if case.impossible is not None:
        raise SkipNotImplemented(case.impossible)
    journal.begin(benchmark, params)
    seconds = float(os.environ.get(LIMIT, "300"))

    def end() -> None:
        journal.note(benchmark, params, f"out of time: more than {seconds:g} s")
        os._exit(1)

    watch = threading.Timer(seconds, end)
    watch.daemon = True
    watch.start()
