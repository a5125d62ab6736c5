"""Weights as heat maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_finite
from nonlocal_core.errors import fail_value
from nonlocal_core.networks.attention_map import AttentionMap
from nonlocal_core.plots.scene import ALIKE, RING, Scene, faded, load_pyplot, mark, place, scene_of

__all__ = ["heatmaps"]

Array = np.ndarray[Any, Any]

_SEQUENCE, _IMAGE, _VIDEO = 1, 2, 3
"""How many spatial axes they have."""

_SHADES = 257
"""Odd, so that 0 has its own in the middle of a scale of both signs."""

_HATCH: dict[str, Any] = {"hatch": "////", "facecolor": "0.92", "edgecolor": "0.6", "linewidth": 0}

_BAR = {_SEQUENCE: (1.01, 0, 0.012, 1), _IMAGE: (1.05, 0, 0.04, 1), _VIDEO: (1.05, 0, 0.04, 1)}
"""Left, bottom, width and height of a colour bar, in units of the axes beside which it stands."""

_TRIANGLE: dict[str, Any] = {"marker": ">", "markersize": 6, "color": "black", "linestyle": ""}

_WIDTH = 10
"""The width of a figure in inches, as far as its panels are neither too small nor too large."""

_ABREAST = 3

_PANEL = (1.1, 3.2)
_STRIP = 0.7
"""The least and the largest side of a panel, and the height of a sequence."""

_BESIDE = 0.9
"""What a colour bar takes beside a panel."""


def heatmaps(
    found: AttentionMap,
    image: Array | None = None,
    *,
    frames: Array | None = None,
    batch: int = 0,
    largest: float | None = None,
    cmap: str | None = None,
) -> Any:
    """Draw the weights of each query over the image, over the frames of the video, or along the sequence.

    Each query has its own scale, from 0 to its largest weight; where weights have both signs, and always in the dot
    product form, it is symmetric about 0. A pooled key is drawn on all positions of its window; positions that are no
    key of the query are hatched. In the softmax forms a triangle at the colour bar marks 1/M, the weight of each of M
    equal keys; M counts the keys of the query before a key mask.

    Args:
        found: the weights of up to 8 queries.
        image: for an image, `(H, W)` or `(H, W, 3)`, bytes or floats from 0 to 1, in the proportions of the grid and of
            any size. None: the weights alone.
        frames: for a video, the same with an axis of frames first, as many as the grid has or a multiple.
        batch: which sample.
        largest: the weight at the end of every scale. None: the largest of the query.
        cmap: the name of one of matplotlib's colour maps. None: "YlOrRd", with two signs "RdBu_r".

    Returns:
        The `matplotlib.figure.Figure`, one of pyplot's.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: if an argument has a wrong type.
        ValueError: if an argument has a wrong value, or a picture does not fit the grid.

    Example:
        >>> from matplotlib import pyplot
        >>> from nonlocal_core import NonLocalSpec
        >>> found = AttentionMap([[[0.6, 0.1, 0.2, 0.1]]], [7], (4, 5), NonLocalSpec(channels=4, subsample=2))
        >>> figure = heatmaps(found, np.zeros((64, 80)))
        >>> figure.get_suptitle()
        'embedded gaussian: weights of 4 keys, which sum to 1'
        >>> pyplot.close(figure)
    """
    pyplot, scene = load_pyplot(), scene_of(found, batch, image, frames)
    if largest is not None and check_finite("largest", largest, "be a positive, finite float") <= 0:
        raise fail_value("largest", "be a positive, finite float", largest)
    if cmap is not None and cmap not in pyplot.colormaps():
        raise fail_value("cmap", "be the name of one of matplotlib's colour maps", repr(cmap))

    figure, strips = _strips(pyplot, scene)
    if scene.pictures is not None:
        _draw_pictures(strips.pop(0), scene)
    maps = scene.found.on_grid().reshape(-1, *scene.sizes)
    colours = _colours(pyplot, scene, cmap)
    marked = False
    for strip, weights, query, name, remark in zip(
        strips, maps, scene.queries, scene.names, scene.remarks, strict=True
    ):
        marked |= _draw_weights(strip, weights, scene, colours, largest)
        _name(strip, f"{name}\n{remark}".strip(), scene)
        mark(strip[query[0]], query[2], query[1])
    figure.suptitle(scene.summary, fontsize="medium")
    handles = _legend(scene, hatched=bool(np.isnan(maps).any()), marked=marked)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _colours(pyplot: Any, scene: Scene, name: str | None) -> Any:
    """Return the colour map; over a picture, the smaller a weight the more of the picture it shows."""
    from matplotlib.colors import ListedColormap

    usual = "RdBu_r" if scene.is_signed else "YlOrRd"
    colours = pyplot.get_cmap(usual if name is None else name)
    if scene.pictures is None:
        return colours
    shares = np.linspace(-1 if scene.is_signed else 0, 1, _SHADES)
    seen = colours(np.linspace(0, 1, _SHADES))
    seen[:, 3] = np.sqrt(abs(shares))
    return ListedColormap(seen, colours.name)


def _draw_weights(strip: list[Any], weights: Array, scene: Scene, colours: Any, largest: float | None) -> bool:
    """Draw the weights `(T, H, W)` of one query, and their colour bar; return whether that has a triangle."""
    most = float(np.nanmax(abs(weights)))
    end = largest if largest is not None else most if most > 0 else 1.0
    look = {"cmap": colours, "vmin": -end if scene.is_signed else 0, "vmax": end, "interpolation": "nearest"}
    for frame, axis in enumerate(strip):
        if scene.pictures is not None:
            place(axis, faded(scene.pictures[frame]), scene)
        shown = place(axis, weights[frame], scene, **look)
        _hatch(axis, np.isnan(weights[frame]))
    return _add_bar(strip[-1], shown, scene, beyond=most > end)


def _strips(pyplot: Any, scene: Scene) -> tuple[Any, list[list[Any]]]:
    """Return a figure with the axes of each query, a list for each, after those of the pictures, if there are any."""
    from matplotlib.ticker import MaxNLocator

    count, frames = len(scene.queries) + (scene.pictures is not None), scene.sizes[0]
    # Images have one panel each, which stand abreast or in a square.
    square = count if count <= _ABREAST else math.ceil(math.sqrt(count))
    columns = square if scene.rank == _IMAGE else frames
    rows = math.ceil(count * frames / columns)
    bars = _BESIDE * (columns if scene.rank == _IMAGE else 1)
    width = min(max((_WIDTH - bars) / columns, _PANEL[0]), _PANEL[1])
    height, title = width * scene.aspect * scene.sizes[1] / scene.sizes[2], 0.1 if scene.rank == _VIDEO else 0.3
    if scene.rank == _SEQUENCE:
        width, height = _WIDTH - bars, _STRIP
    figure = pyplot.figure(figsize=(columns * width + bars, rows * (height + title) + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count * frames :]:
        axis.remove()
    for axis in axes[: count * frames]:
        axis.set(xticks=[], yticks=[])
    if scene.rank == _SEQUENCE:
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if scene.rank == _VIDEO:
        for frame in range(frames):
            axes[frame].set_title(f"frame {frame}", fontsize="small")
    return figure, [axes[start : start + frames] for start in range(0, count * frames, frames)]


def _draw_pictures(strip: list[Any], scene: Scene) -> None:
    """Draw the pictures in their own colours, with all queries numbered."""
    for axis, picture in zip(strip, scene.pictures, strict=True):  # type: ignore[arg-type]  # there are some
        place(axis, picture, scene)
    for number, (frame, row, column) in enumerate(scene.queries, 1):
        mark(strip[frame], column, row, str(number))
    _name(strip, "queries", scene)


def _name(strip: list[Any], name: str, scene: Scene) -> None:
    """Write what a query, or the row of pictures, is called."""
    if scene.rank == _VIDEO:
        strip[0].set_ylabel(name.replace(", row", "\nrow"), fontsize="small")
    else:
        strip[0].set_title(name, fontsize="small", loc="left" if scene.rank == _SEQUENCE else "center")


def _hatch(axis: Any, outside: Array) -> None:
    """Hatch the positions that are no keys: those around a rectangle of keys, or all."""
    from matplotlib.patches import Rectangle

    rows, columns = outside.shape
    row, column = (np.flatnonzero(~outside.all(axis=other)) for other in (1, 0))
    top, bottom = (row[0], row[-1] + 1) if row.size else (rows, rows)
    left, right = (column[0], column[-1] + 1) if column.size else (0, columns)
    around = [
        (0, 0, columns, top),
        (0, bottom, columns, rows),
        (0, top, left, bottom),
        (right, top, columns, bottom),
    ]
    for x, y, x_end, y_end in around:
        if x < x_end and y < y_end:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), x_end - x, y_end - y, **_HATCH))


def _add_bar(axis: Any, shown: Any, scene: Scene, *, beyond: bool) -> bool:
    """Add a colour bar beside the axes, in the softmax forms with a triangle where all keys are equal.

    Returns:
        Whether it has a triangle, which it has if the weight of equal keys is on the scale.
    """
    from matplotlib.ticker import MaxNLocator

    extend = "neither" if not beyond else "both" if scene.is_signed else "max"
    look = {"ticks": MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]), "format": "%g", "extend": extend}
    bar = axis.figure.colorbar(shown, cax=axis.inset_axes(_BAR[scene.rank]), **look)
    bar.ax.tick_params(labelsize="small")
    bar.set_label("weight", size="small")
    uniform = 1 / scene.found.keys_per_query
    # Of equal keys the largest weight is 1/M but for its rounding.
    marked = scene.found.spec.is_softmax and uniform <= shown.norm.vmax * (1 + ALIKE)
    if marked:
        bar.ax.plot(0, uniform, **_TRIANGLE, transform=bar.ax.get_yaxis_transform(), clip_on=False)
    return marked


def _legend(scene: Scene, *, hatched: bool, marked: bool) -> list[Any]:
    """Return what explains the marks that the figure has."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], **RING, markeredgecolor="black", label="the query")]
    if hatched:
        handles.append(Patch(**_HATCH, label="no key of the query"))
    if marked:
        keys = scene.found.keys_per_query
        handles.append(Line2D([], [], **_TRIANGLE, label=f"1/{keys:,}, were all keys equal"))
    return handles
