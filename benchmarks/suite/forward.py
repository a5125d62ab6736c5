"""The block in evaluation."""

from __future__ import annotations

from measuring.case import BACKENDS, DEVICES, DTYPES, FORMS, GEOMETRIES, METHODS, Case
from measuring.subject import subject

__all__ = ["Forward"]


class Forward:
    """One call of the block, batch 1, without gradients."""

    params = (BACKENDS, DEVICES, FORMS, METHODS, tuple(GEOMETRIES), DTYPES)
    param_names = ("backend", "device", "pairwise", "method", "geometry", "dtype")
    rounds, number, min_run_count, repeat = 3, 1, 2, (1, 10, 2.0)

    def setup(self, *params: str) -> None:
        """Take the case; refuse what cannot be measured."""
        self.subject = subject("forward.Forward", params, self.case(*params), "forward")

    @staticmethod
    def case(backend: str, device: str, pairwise: str, method: str, geometry: str, dtype: str) -> Case:
        """Return what the parameters mean."""
        return Case(backend, device, pairwise, method, *GEOMETRIES[geometry], dtype)

    def time_forward(self, *_: str) -> None:
        """Seconds of one call, the result being there."""
        self.subject.run()

    def track_memory(self, *_: str) -> int | None:
        """Peak memory of one call beside what is held before it, the output among it."""
        return self.subject.peak()

    track_memory.unit = "bytes"  # type: ignore[attr-defined]
