"""Positions that are cut over several devices: along which axes keys are shared, and where a cut may be."""

from __future__ import annotations

from collections.abc import Sequence

from nonlocal_core.errors import fail_value
from nonlocal_core.geometry import interacting_axes, window_of
from nonlocal_core.spec.block import NonLocalSpec

__all__ = ["check_pieces", "inner_axis"]


def inner_axis(spec: NonLocalSpec, rank: int, axis: int) -> int | None:
    """Return which axis of a set a spatial axis is, None for one along which a cut leaves every set whole."""
    inner = interacting_axes(spec.axes, rank)
    is_between = axis not in inner or (spec.group_size is not None and axis == 0)
    return None if is_between else inner.index(axis)


def check_pieces(spec: NonLocalSpec, rank: int, axis: int, pieces: Sequence[int]) -> None:
    """Check that each device has positions and keys of its own, and that no window or group is on two.

    Args:
        spec: the block.
        rank: the number of spatial axes of its input.
        axis: the one that is cut.
        pieces: how many positions along it each device has.

    Raises:
        ValueError: from sizes of the whole alone, so that every device raises the same.
    """
    got = f"{sum(pieces)} positions along spatial axis {axis} in pieces of {list(pieces)}"
    if min(pieces) < 1:
        raise fail_value("x", "have positions for every device that it is cut over", got)
    if inner_axis(spec, rank, axis) is None:
        if axis == 0 and spec.group_size is not None and any(piece % spec.group_size for piece in pieces):
            raise fail_value("x", f"be cut between groups of `group_size={spec.group_size}` frames", got)
        return
    window = (window_of(spec.subsample, rank) or (1,) * rank)[axis]
    if any(piece % window for piece in pieces[:-1]) or pieces[-1] < window:
        raise fail_value("x", f"be cut between windows of `subsample`, {window} here, one for each device", got)
