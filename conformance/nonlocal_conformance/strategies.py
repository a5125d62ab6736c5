"""Random valid cases, for property tests with hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from nonlocal_conformance.cases import Case
from nonlocal_core.options import PAIRWISE

__all__ = ["cases"]

# Fewer channels leave gradients that are one sum, which may cancel by chance.
_CHANNELS = st.integers(3, 6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case: a valid spec of a named form with a grid that it accepts, in evaluation.

    In training a random batch can leave a channel with nearly no variance, and its results are rounding errors.
    """
    rank = draw(st.integers(1, 3))
    window = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank).map(tuple))
    spatial = [size * draw(st.integers(1, 3)) + draw(st.integers(0, 1)) for size in window]
    options: dict[str, Any] = {
        "channels": 2 * draw(_CHANNELS),
        "inner_channels": draw(st.none() | _CHANNELS),
        "pairwise": draw(st.sampled_from(PAIRWISE)),
        "scale": draw(st.none() | st.sampled_from(["inner", "input", -0.5, 2.0])),
        "subsample_at": draw(st.sampled_from(["projection", "input"])),
        "bias": draw(st.booleans()),
        "norm": draw(st.sampled_from([None, "batch", "affine"])),
        "residual": draw(st.booleans()),
    }
    choices = ["all", *((axis,) for axis in range(rank))]
    options["axes"] = draw(st.sampled_from([*choices, "space", "time"] if rank == 3 else choices))  # noqa: PLR2004
    inner = {"all": tuple(range(rank)), "space": (1, 2), "time": (0,)}.get(options["axes"], options["axes"])
    if draw(st.booleans()):
        options["subsample"] = tuple(length if axis in inner else 1 for axis, length in enumerate(window))
    if rank == 3 and options["axes"] == "all" and draw(st.booleans()):  # noqa: PLR2004
        options["group_size"] = spatial[0]
        spatial[0] *= draw(st.integers(1, 2))
    return Case(
        name=f"random_{draw(st.integers(0, 10**6))}",
        options=options,
        spatial=tuple(spatial),
        batch=draw(st.integers(2, 3)),
        mask=draw(st.sampled_from([None, "some"])),
    )
