"""What is drawn: one sample of a map, with pictures that fit its grid."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_int
from nonlocal_core.errors import fail_value
from nonlocal_core.networks.attention_map import AttentionMap

__all__ = ["ALIKE", "COLOURS", "RING", "Scene", "faded", "load_pyplot", "mark", "place", "scene_of"]

Array = np.ndarray[Any, Any]

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""One for each query that can be drawn: those of Okabe and Ito, which the colour-blind tell apart."""

RING: dict[str, Any] = {
    "marker": "o",
    "linestyle": "",
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgewidth": 1.8,
}
"""What marks a query, but for its colour."""

ALIKE = 0.01
"""By what share of the largest two weights may differ and still count as equal."""

_AXES = {1: ("position",), 2: ("row", "column"), 3: ("frame", "row", "column")}
_IMAGE, _VIDEO = 2, 3
"""How many spatial axes they have."""

_ROUNDING = 1e-3
"""How far resizing may carry the values of a picture beyond 0 and 1."""

_GREY = (0.299, 0.587, 0.114)
"""The shares of red, green and blue in what the eye takes for brightness."""

_PALE = 0.65
"""How much of the contrast of a picture is left beneath weights."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One sample of a map seen as a video: an image is one frame, a sequence one frame of one row.

    Args:
        found: the map of that sample alone.
        pictures: `(T, h, w)` or `(T, h, w, 3)` in 0..1, or None.
    """

    found: AttentionMap
    pictures: Array | None

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.found.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """T, H, W."""
        return (*(1,) * (_VIDEO - self.rank), *self.found.sizes)

    @property
    def queries(self) -> Array:
        """Frame, row and column of each query, `(Q, 3)`."""
        return np.stack(np.unravel_index(self.found.positions, self.sizes), axis=-1)

    @property
    def names(self) -> list[str]:
        """What the queries are called."""
        axes = _AXES[self.rank]
        places = (zip(axes, query, strict=True) for query in self.found.coordinates())
        return [
            f"{number}: " + ", ".join(f"{axis} {index}" for axis, index in place)
            for number, place in enumerate(places, 1)
        ]

    @property
    def remarks(self) -> list[str]:
        """What to say of the weights of each query, lest they be taken for a fault; "" for nothing."""
        _, (weights,) = self.found.strongest(self.found.keys_per_query)
        return [
            "no valid key"
            if self.found.spec.is_softmax and not row.any()
            else "all weights alike"
            if np.ptp(row) <= ALIKE * abs(row).max()
            else ""
            for row in weights
        ]

    @property
    def is_signed(self) -> bool:
        """Whether weights may have both signs."""
        return self.found.spec.pairwise == "dot_product" or bool((self.found.weights < 0).any())

    @property
    def summary(self) -> str:
        """What the weights are, in words."""
        spec = self.found.spec
        form = spec.pairwise.replace("_", " ") if isinstance(spec.pairwise, str) else "function"
        keys = f"{self.found.keys_per_query:,} keys"
        if spec.is_softmax:
            return (
                f"{form}: weights of {keys}, {'which sum to 1' if self.found.weights.any() else 'none of them valid'}"
            )
        return f"{form}: weights of {keys}, score / number of keys"

    @property
    def aspect(self) -> float:
        """The height of a position, in units of its width."""
        if self.pictures is None:
            return 1.0
        (_, height, width), (_, rows, columns) = self.pictures.shape[:3], self.sizes
        return height / rows / (width / columns)


def scene_of(found: AttentionMap, batch: int, image: Any, frames: Any) -> Scene:
    """Return what is to be drawn, once the arguments are checked."""
    if not isinstance(found, AttentionMap):
        message = f"`found` must be an AttentionMap. Got {type(found).__name__}."
        raise TypeError(message)
    samples, queries, _ = found.weights.shape
    rule = f"be the index of a sample, from 0 to {samples - 1}"
    if check_int("batch", batch, rule, least=0) >= samples:
        raise fail_value("batch", rule, batch)
    if not 1 <= queries <= len(COLOURS):
        raise fail_value("found", f"hold the weights of 1 to {len(COLOURS)} queries to be drawn", f"{queries} queries")
    weights = found.weights[batch : batch + 1].astype(np.float64)
    if not np.isfinite(weights).all():
        raise fail_value("found", "hold finite weights", "others")
    return Scene(dataclasses.replace(found, weights=weights), _pictures(found.sizes, image=image, frames=frames))


def _pictures(sizes: tuple[int, ...], **given: Any) -> Array | None:
    """Return the frames to draw beneath a grid, `(T, h, w)` or `(T, h, w, 3)` in 0..1; None if there are none."""
    name = {_IMAGE: "image", _VIDEO: "frames"}.get(len(sizes), "")
    for other, picture in given.items():
        if other != name and picture is not None:
            raise fail_value(other, f"be None for {len(sizes)} spatial axes", f"shape {np.shape(picture)}")
    if given.get(name) is None:
        return None
    pictures, axes = np.asarray(given[name]), ", ".join("THW"[-len(sizes) :])
    colour = pictures.shape[len(sizes) :]
    if pictures.ndim < len(sizes) or colour not in {(), (3,)} or pictures.size == 0:
        raise fail_value(name, f"have the shape ({axes}) or ({axes}, 3)", f"shape {pictures.shape}")
    sides = pictures.shape[len(sizes) - 2 : len(sizes)]
    if not _are_proportional(sides, sizes[-2:]):
        rule = f"have the proportions of the grid, {sizes[-2]} x {sizes[-1]} positions, height first"
        raise fail_value(name, rule, f"{sides[0]} x {sides[1]} pixels")
    pictures = _unit(name, pictures)
    if name == "image":
        return pictures[None]
    each, rest = divmod(len(pictures), sizes[0])
    if rest:
        raise fail_value(name, f"be {sizes[0]} frames, as the grid has, or a multiple", len(pictures))
    return pictures[each // 2 :: each]


def _are_proportional(sides: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Return whether one stride turns these sides into these sizes, rounded up or down."""
    least = max(side / (size + 1) for side, size in zip(sides, sizes, strict=True))
    most = min(side / (size - 1) if size > 1 else math.inf for side, size in zip(sides, sizes, strict=True))
    return least < most


def _unit(name: str, pictures: Array) -> Array:
    """Return pictures as floats from 0 to 1."""
    rule = "hold bytes, or floats from 0 to 1"
    if pictures.dtype == np.uint8:
        return pictures / 255
    if pictures.dtype.kind != "f":
        message = f"`{name}` must {rule}. Got {pictures.dtype}."
        raise TypeError(message)
    if not (pictures.min() >= -_ROUNDING and pictures.max() <= 1 + _ROUNDING):
        raise fail_value(name, rule, f"values from {pictures.min():.3g} to {pictures.max():.3g}")
    return np.clip(pictures, 0, 1)


def load_pyplot() -> Any:
    """Return matplotlib's pyplot, or say what to install."""
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        message = "nonlocal_core.plots needs matplotlib. Install it with `pip install 'nonlocal-core[plots]'`."
        raise ImportError(message) from error
    return plt


def place(axis: Any, picture: Array, scene: Scene, left: float = 0.0, **look: Any) -> Any:
    """Draw a picture on the grid, whose first column is at `left`: position i covers i - 0.5 to i + 0.5."""
    _, rows, columns = scene.sizes
    extent = (left - 0.5, left + columns - 0.5, rows - 0.5, -0.5)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if picture.ndim == _IMAGE else {}
    aspect = "auto" if scene.rank == 1 else scene.aspect
    return axis.imshow(picture, **(grey | look), extent=extent, aspect=aspect)


def faded(picture: Array) -> Array:
    """Return a picture in pale grey, so that every colour is a weight's."""
    grey = picture if picture.ndim == _IMAGE else picture @ np.array(_GREY)
    return 1 - _PALE * (1 - grey)


def mark(axis: Any, column: float, row: float, text: str = "", colour: str = "white") -> None:
    """Put a ring around a query, and a text beside it."""
    from matplotlib.patheffects import withStroke

    outline = "black" if colour == "white" else "white"
    stroke = [withStroke(linewidth=4, foreground=outline)]
    axis.plot(column, row, **RING, markeredgecolor=colour, path_effects=stroke)
    beside = {"xytext": (8, 4), "textcoords": "offset points"}
    axis.annotate(text, (column, row), **beside, color=colour, weight="bold", path_effects=stroke)
