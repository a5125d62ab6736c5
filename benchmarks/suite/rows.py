"""Some rows of the weights, as one asks for them to draw where a position looks."""

from __future__ import annotations

from measuring.case import DEVICES, FORMS, GEOMETRIES, OURS, Case
from measuring.subject import subject

__all__ = ["Rows"]


class Rows:
    """64 rows of the weights, spread over all positions; other implementations give none."""

    params = (tuple(OURS), DEVICES, FORMS, tuple(GEOMETRIES))
    param_names = ("backend", "device", "pairwise", "geometry")
    rounds, number, min_run_count, repeat = 3, 1, 2, (1, 10, 2.0)

    def setup(self, *params: str) -> None:
        """Take the case; refuse what cannot be measured."""
        self.subject = subject("rows.Rows", params, self.case(*params), "rows")

    @staticmethod
    def case(backend: str, device: str, pairwise: str, geometry: str) -> Case:
        """Return what the parameters mean."""
        return Case(backend, device, pairwise, "auto", *GEOMETRIES[geometry])

    def time_rows(self, *_: str) -> None:
        """Seconds of one call, the rows being there."""
        self.subject.run()

    def track_memory(self, *_: str) -> int | None:
        """Peak memory of one call beside what is held before it, the rows among it."""
        return self.subject.peak()

    track_memory.unit = "bytes"  # type: ignore[attr-defined]
