"""Photographs in and the demo's picture out; needs the extra "demo"."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nonlocal_core.files.regular import read_file

__all__ = ["PIXELS", "Panel", "built_in", "draw", "read", "strong_edge"]

Array = np.ndarray[Any, Any]

_CENTRE = (156, 246)
"""The middle of the default crop of the built-in photograph: the photographer's face and camera."""

_DECADES = 4
_REACHES = 3
_LEAST_RADIUS = 8

_PANEL = 4.2
_LEAST_PANEL = 2.6
"""The sides of a panel in inches; titles need the least."""

PIXELS = 2**25
"""How many pixels a photograph has at most, if no one says otherwise."""

_SCANS = 100
"""A progressive JPEG file has some ten."""

_MARK = "tab:orange"


def built_in(size: int) -> Array:
    """Return a square crop of scikit-image's photograph of a photographer, `(size, size, 1)` in 0..1.

    Raises:
        ValueError: if the photograph is smaller than that.
    """
    from skimage import data

    camera: Any = data.camera
    photograph: Array = camera() / 255
    sides = photograph.shape
    if size > min(sides):
        message = f"must be at most {min(sides)} for the built-in photograph. Got {size}."
        raise ValueError(message)
    top, left = (min(max(middle - size // 2, 0), side - size) for middle, side in zip(_CENTRE, sides, strict=True))
    return photograph[top : top + size, left : left + size, None]


def read(path: Path, size: int, pixels: int = PIXELS) -> Array:
    """Read a photograph, `(H, W, 1)` or, in colour, `(H, W, 3)`, in 0..1.

    What is transparent is laid on white. A photograph whose longer side is above `size` is made smaller.

    Args:
        path: a PNG or JPEG file.
        size: the largest side.
        pixels: how many pixels it has at most; one with more is not decoded.

    Raises:
        ValueError: if it is not such a file, a damaged one, or has more pixels; the text follows the name of the
            argument.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        content = read_file(path)
        _check_scans(content)
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), _at_most(pixels):
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        message = f"must have at most {pixels} pixels, or --most-pixels must allow more. Got {str(path)!r}."
        raise ValueError(message) from None
    except UnidentifiedImageError:
        message = f"must be a PNG or JPEG file. Got {str(path)!r}, which is neither."
        raise ValueError(message) from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        message = f"must be a PNG or JPEG file that can be read. Got {str(path)!r}: {reason}."
        raise ValueError(message) from None
    plain = _plain(upright)
    factor = min(1.0, size / max(plain.size))
    sides = tuple(max(1, round(side * factor)) for side in plain.size)
    if sides != plain.size:
        plain = plain.resize(sides, Image.Resampling.LANCZOS)
    values = np.atleast_3d(np.asarray(plain, dtype=np.float64)) / (1 if plain.mode == "F" else 255)
    # Bytes are cut off where resizing overshoots, floats are not.
    return np.clip(values, 0, 1)


@contextlib.contextmanager
def _at_most(pixels: int) -> Iterator[None]:
    """Let Pillow warn of a picture with more pixels, once it has read the size."""
    from PIL import Image

    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def _check_scans(content: bytes) -> None:
    """Check that a JPEG file goes over its pixels not much more often than any does, some bytes each time."""
    most = _SCANS + len(content) // 2**14  # what follows the picture may hold the two bytes by chance
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > most:
        message = f"it has more than {most} scans"
        raise ValueError(message)


def _plain(image: Any) -> Any:
    """Return a grey or colour image without transparency, in bytes or, from 16 bits, in floats of 0..1."""
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray(np.asarray(image, dtype=np.float32) / np.float32(65535))
    grey = image.mode in {"1", "L", "LA", "La"}
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One part of the picture."""

    title: str
    image: Array


def draw(panels: list[Panel], weights: Array, pixel: tuple[int, int], reach: float) -> bytes:
    """Draw the demo's picture.

    Args:
        panels: three images of one shape; the weights are drawn over the last.
        weights: `(H, W)`, of all pixels in the sum for one.
        pixel: row and column of that one.
        reach: s, in pixels; the weights are shown as far as a few times that.

    Returns:
        The content of a PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    sides = [max(_LEAST_PANEL, _PANEL * side / max(weights.shape)) for side in weights.shape]
    figure = Figure(figsize=(2 * sides[1] + 0.8, 2 * sides[0] + 0.8), dpi=150, layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _show(axis, panel.image)
        axis.set_title(panel.title)
    left, right, bottom, top = _detail(weights.shape, pixel, reach)
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=_MARK, linewidth=1.5)
    axes[1, 0].add_patch(frame)
    _draw_weights(axes[1, 1], panels[-1].image, weights, pixel)
    axes[1, 1].set(xlim=(left, right), ylim=(bottom, top))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _show(axis: Any, image: Array) -> None:
    axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()


def _draw_weights(axis: Any, image: Array, weights: Array, pixel: tuple[int, int]) -> None:
    """Draw the weights over the image, in a logarithmic scale; the small ones leave it bare."""
    from matplotlib.colors import LogNorm

    _show(axis, image)
    largest = float(weights.max())
    least = largest * 10.0**-_DECADES
    shown = np.ma.masked_less(weights, least)
    colours = axis.imshow(shown, cmap="plasma", norm=LogNorm(least, largest), alpha=0.75, interpolation="nearest")
    row, column = pixel
    axis.plot(column, row, "+", color="white", markersize=14, markeredgewidth=2)
    axis.set_title(f"weights of pixel ({row}, {column}) in the frame")
    axis.figure.colorbar(colours, ax=axis, shrink=0.9, pad=0.02)


def _detail(shape: Sequence[int], pixel: tuple[int, int], reach: float) -> tuple[float, float, float, float]:
    """Return the left, right, bottom and top edge of a part around a pixel, in the proportions of the image."""
    share = min(1.0, (2 * max(_LEAST_RADIUS, _REACHES * reach) + 1) / min(shape))
    edges = []
    for middle, size in zip(pixel, shape, strict=True):
        extent = share * size
        start = min(max(middle - extent / 2, -0.5), size - 0.5 - extent)
        edges.append((start, start + extent))
    (top, bottom), (left, right) = edges
    return left, right, bottom, top


def strong_edge(image: Array) -> tuple[int, int]:
    """Return the row and column of the strongest edge in the middle half of an image, `(H, W, C)`."""
    padded = np.pad(image.mean(axis=-1), 1, mode="edge")
    steps = (padded[2:, 1:-1] - padded[:-2, 1:-1]) ** 2 + (padded[1:-1, 2:] - padded[1:-1, :-2]) ** 2
    top, left = (size // 4 for size in steps.shape)
    middle = steps[top : steps.shape[0] - top, left : steps.shape[1] - left]
    row, column = np.unravel_index(int(middle.argmax()), middle.shape)
    return int(row) + top, int(column) + left
