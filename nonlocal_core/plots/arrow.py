"""Weights as arrows from frame to frame, as in figure 3 of Wang et al. (CVPR 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nonlocal_core.arguments import check_int
from nonlocal_core.errors import fail_value
from nonlocal_core.networks.attention_map import AttentionMap
from nonlocal_core.plots.scene import COLOURS, RING, Scene, faded, load_pyplot, mark, place, scene_of

__all__ = ["arrows"]

Array = np.ndarray[Any, Any]

_VIDEO = 3
"""How many spatial axes it has."""

_SIGNS = {True: "positive weight", False: "negative weight"}
_SIGN_COLOURS = {True: "#d55e00", False: "#0072b2"}

_GAP = 0.06
"""Between frames, as a share of their width."""

_WIDTHS = (0.5, 3.0)
_OPACITIES = (0.3, 0.95)
"""The width and the opacity of an arrow of no weight, and those of the strongest."""

_FRAME = (1.5, 3.2)
_WIDTH = 12
"""The least and the largest width of a frame in inches, and that of a figure between these."""

_LEAST = 8
"""The width in inches that the title and the two columns of the legend need."""


def arrows(found: AttentionMap, frames: Array, *, strongest: int = 20, batch: int = 0) -> Any:
    """Draw arrows from each query to its strongest keys in all frames of a video (figure 3 of the paper).

    The frames stand side by side. The stronger the weight, the wider and the less transparent the arrow; a key of
    weight 0 gets none. What a key covers is framed, in every frame that it covers; the arrow ends in the middle. Each
    query has its colour; where weights have both signs, and always in the dot product form, each sign has.

    Args:
        found: the weights of up to 8 queries of a video.
        frames: `(T, H, W)` or `(T, H, W, 3)`, bytes or floats from 0 to 1, in the proportions of the grid and of any
            size; as many frames as the grid has or a multiple.
        strongest: to how many keys of each query arrows lead, at most.
        batch: which sample.

    Returns:
        The `matplotlib.figure.Figure`, one of pyplot's.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if an argument has a wrong type.
        ValueError: if an argument has a wrong value, or the frames do not fit the grid.

    Example:
        >>> from matplotlib import pyplot
        >>> from nonlocal_core import NonLocalSpec
        >>> found = AttentionMap([[[0.6, 0.1, 0.2, 0.1]]], [1], (2, 1, 2), NonLocalSpec(channels=4))
        >>> figure = arrows(found, np.zeros((2, 8, 16)), strongest=2)
        >>> figure.get_suptitle()
        'embedded gaussian: weights of 4 keys, which sum to 1; the 2 strongest of each query'
        >>> pyplot.close(figure)
    """
    pyplot, scene = load_pyplot(), scene_of(found, batch, None, frames)
    if scene.rank != _VIDEO:
        raise fail_value("found", "be of a video, with 3 spatial axes", f"{scene.rank} spatial axes")
    if scene.pictures is None:
        raise fail_value("frames", "be given", None)
    count = min(check_int("strongest", strongest), scene.found.keys_per_query)
    keys, weights = (a[0] for a in scene.found.strongest(count))
    figure, axis, step = _frames(pyplot, scene)
    middles, top = scene.found.key_coordinates()[keys], float(abs(weights).max())
    for query, ends, values, colour in zip(scene.queries, middles, weights, COLOURS, strict=False):
        start = _point(query, step)
        # The strongest come last and lie on top.
        for end, weight in zip(ends[::-1], values[::-1], strict=True):
            if weight != 0:
                shown = _SIGN_COLOURS[bool(weight > 0)] if scene.is_signed else colour
                look = {"color": shown, **_strength(abs(weight) / top)}
                _draw_key(axis, end, scene.found.window, step, look)
                _draw_arrow(axis, start, _point(end, step), look)
    for number, query in enumerate(scene.queries):
        mark(axis, *_point(query, step), str(number + 1), "white" if scene.is_signed else COLOURS[number])
    drawn = f"; the {count} strongest of each query" if weights.any() else ""
    figure.suptitle(scene.summary + drawn, fontsize="medium")
    handles = _legend(scene, weights)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _frames(pyplot: Any, scene: Scene) -> tuple[Any, Any, float]:
    """Return a figure, its axes with the frames side by side, and the distance of their left edges in positions."""
    count, rows, columns = scene.sizes
    step = columns * (1 + _GAP)
    width = min(max(_WIDTH / count, _FRAME[0]), _FRAME[1])
    height = width * scene.aspect * rows / columns
    lines = 2 + len(scene.queries) // 2
    whole = max(count * width * (1 + _GAP), _LEAST)
    figure = pyplot.figure(figsize=(whole, height + 0.6 + 0.25 * lines), layout="constrained")
    axis = figure.subplots()
    for frame, picture in enumerate(scene.pictures):  # type: ignore[arg-type]  # there are some
        place(axis, faded(picture), scene, left=frame * step)
        axis.text(frame * step + (columns - 1) / 2, -0.5, f"frame {frame}\n", ha="center", va="center")
    axis.set(xlim=(-0.5, (count - 1) * step + columns - 0.5), ylim=(rows - 0.5, -0.5))
    axis.set_axis_off()
    return figure, axis, step


def _point(where: Array, step: float) -> tuple[float, float]:
    """Return where frame, row and column are in the figure; a key between two frames is in the earlier."""
    frame, row, column = where
    return float(np.floor(frame) * step + column), float(row)


def _strength(share: float) -> dict[str, Any]:
    """Return the look of an arrow whose weight is this share of the largest."""
    low, high = np.array([_WIDTHS[0], _OPACITIES[0]]), np.array([_WIDTHS[1], _OPACITIES[1]])
    width, opacity = low + share * (high - low)
    return {"linewidth": float(width), "alpha": float(opacity)}


def _draw_arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], look: dict[str, Any]) -> None:
    """Draw an arrow, unless it leads to where it starts."""
    if start != end:
        shape = {"arrowstyle": "-|>", "shrinkA": 6, "shrinkB": 0}
        axis.annotate("", end, start, arrowprops={**shape, **look, "mutation_scale": 6 + 2 * look["linewidth"]})


def _draw_key(axis: Any, middle: Array, window: tuple[int, ...], step: float, look: dict[str, Any]) -> None:
    """Frame the positions that a key covers."""
    from matplotlib.patches import Rectangle

    first = middle - (np.array(window) - 1) / 2
    for frame in range(int(first[0]), int(first[0]) + window[0]):
        corner = (frame * step + first[2] - 0.5, first[1] - 0.5)
        axis.add_patch(Rectangle(corner, window[2], window[1], fill=False, **(look | {"linewidth": 1})))


def _legend(scene: Scene, weights: Array) -> list[Any]:
    """Return what explains the rings, the colours and the widths."""
    from matplotlib.lines import Line2D

    handles = []
    for name, remark, values, colour in zip(scene.names, scene.remarks, weights, COLOURS, strict=False):
        share = f"{values.sum():.0%} of its weight" if scene.found.spec.is_softmax else ""
        details = f" ({remark or share})" if remark or share else ""
        shown = "black" if scene.is_signed else colour
        handles.append(Line2D([], [], **RING, markeredgecolor=shown, label=name + details))
    if scene.is_signed:
        handles += [Line2D([], [], color=colour, label=_SIGNS[sign]) for sign, colour in _SIGN_COLOURS.items()]
    sizes = abs(weights[weights != 0])
    if sizes.size:
        for label, size in {"largest": sizes.max(), "smallest drawn": sizes.min()}.items():
            look = {"color": "black", **_strength(size / sizes.max())}
            handles.append(Line2D([], [], **look, label=f"{label} weight: {size:.3g}"))
    return handles
