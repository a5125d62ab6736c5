"""Random valid specs and cases, for property tests with hypothesis."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from nonlocal_conformance.cases import Case
from nonlocal_core import NonLocalSpec
from nonlocal_core.geometry import VIDEO, interacting_axes
from nonlocal_core.spec.options import PAIRWISE

__all__ = ["cases", "specs_and_grids"]

_WIDTHS = st.integers(1, 9)
_FACTORS = st.floats(allow_nan=False, allow_infinity=False).filter(bool)


@st.composite
def specs_and_grids(
    draw: st.DrawFn,
    channels: st.SearchStrategy[int] = _WIDTHS,
    inner_channels: st.SearchStrategy[int] = _WIDTHS,
    factors: st.SearchStrategy[float] = _FACTORS,
    epsilons: st.SearchStrategy[float] = st.floats(1e-300, 1e300),  # noqa: B008 - strategies do not change
) -> tuple[NonLocalSpec, tuple[int, ...]]:
    """Draw a valid spec of a named form, and the spatial sizes of an input that it accepts."""
    rank = draw(st.integers(1, 3))
    chosen = st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True)
    axes: Any = draw(st.just("all") | chosen | st.sampled_from(["space", "time"] if rank == VIDEO else ["all"]))
    inner = interacting_axes(axes, rank)
    group = draw(st.none() | st.integers(1, 4)) if rank == VIDEO and axes == "all" else None
    window = [draw(st.integers(1, 3)) if axis in inner else 1 for axis in range(rank)]
    if group is not None:
        window[0] = min(window[0], group)
    sizes = [draw(st.integers(length, 6)) for length in window]
    if group is not None:
        sizes[0] = group * draw(st.integers(1, 3))
    scales: st.SearchStrategy[Any] = st.sampled_from([None, "inner", "input"]) | factors
    pairwise = draw(st.sampled_from(PAIRWISE))
    layers = NonLocalSpec(channels=1, pairwise=pairwise).layers
    spec = NonLocalSpec(
        channels=draw(channels),
        inner_channels=draw(st.none() | inner_channels),
        pairwise=pairwise,
        scale=draw(scales),
        subsample=draw(st.sampled_from([None, tuple(window), min(window)])),
        subsample_at=draw(st.sampled_from(["projection", "input"])),
        axes=axes,
        group_size=group,
        bias=draw(st.booleans() | st.dictionaries(st.sampled_from(layers), st.booleans())),
        norm=draw(st.sampled_from([None, "batch", "affine"])),
        norm_epsilon=draw(epsilons),
        norm_momentum=draw(st.floats(0, 1)),
        residual=draw(st.booleans()),
        zero_init=draw(st.booleans()),
    )
    return spec, tuple(sizes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case in evaluation, whose results are more than rounding errors.

    Fewer channels would leave gradients that are one sum, which may cancel by chance; in training a random batch
    can leave a channel with nearly no variance.
    """
    drawn = specs_and_grids(st.integers(6, 12), st.integers(3, 6), st.sampled_from([-0.5, 2.0]), st.just(1e-3))
    spec, sizes = draw(drawn)
    options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    mask = draw(st.sampled_from([None, "some"]))
    return Case(f"random_{draw(st.integers(0, 10**6))}", options, sizes, batch=draw(st.integers(2, 3)), mask=mask)
