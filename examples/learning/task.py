"""The task: two handwritten digits far apart on one canvas. Is it the same twice, and which are there?"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

__all__ = ["CANVAS", "CLASSES", "SIDE", "Digits", "digits", "foursomes"]

Array = np.ndarray[Any, Any]

CANVAS = (10, 36)
"""Height and width of a canvas, in pixels."""

CLASSES = 4
"""The digits are 0 to 3, so that a few minutes of one processor are enough."""

SIDE = 8
"""Height and width of a digit, in pixels."""

_SHIFT = 3
"""A digit stands in one of so many columns at its end of the canvas, and in any row."""

_TEST = 200
"""So many images are kept for the test."""


class Digits(NamedTuple):
    """Images `(n, 8, 8)` in 0..1, sorted by their class `(n,)`."""

    images: Array
    classes: Array


def digits() -> tuple[Digits, Digits]:
    """Return the digits of scikit-learn for the training and, others, for the test."""
    found = load_digits()
    order = np.random.default_rng(2018).permutation(np.flatnonzero(found.target < CLASSES))
    parts = order[_TEST:], order[:_TEST]
    first, second = (part[np.argsort(found.target[part], kind="stable")] for part in parts)
    images = (found.images / 16).astype(np.float32)
    return Digits(images[first], found.target[first]), Digits(images[second], found.target[second])


def foursomes(source: Digits, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return canvases in fours: two unequal digits a, b on the left and c like a, d like b on the right.

    The four are a-c and b-d, which are the same digit, and a-d and b-c, which are not. So each end by itself
    says nothing: every image is in as many pairs of the one kind as of the other.

    Args:
        source: the digits to choose from.
        count: how many fours.
        rng: the source of the choice.

    Returns:
        Canvases `(4 count, H, W, 1)` and answers `(4 count, 1 + CLASSES)`, float32: 1 where both ends show the same
        digit, and where each of the digits is there.
    """
    first = rng.integers(CLASSES, size=count)
    classes = np.stack([first, (first + rng.integers(1, CLASSES, size=count)) % CLASSES], axis=1)  # [four, a or b]
    starts, sizes = np.searchsorted(source.classes, classes), np.bincount(source.classes)[classes]
    left = rng.integers(sizes)
    right = (left + rng.integers(1, sizes)) % sizes  # another image of the same digit
    ends = [_placed(source.images[starts + chosen], rng, at) for chosen, at in ((left, 0), (right, CANVAS[1]))]
    canvases = ends[0][:, [0, 1, 0, 1]] + ends[1][:, [0, 1, 1, 0]]
    shown = np.eye(CLASSES)[classes]  # [four, a or b, digit]
    present = np.maximum(shown[:, [0, 1, 0, 1]], shown[:, [0, 1, 1, 0]])
    same = np.broadcast_to(np.array([1, 1, 0, 0])[:, None], (count, 4, 1))
    labels = np.concatenate([same, present], axis=-1).astype(np.float32)
    return canvases.reshape(-1, *CANVAS, 1), labels.reshape(len(labels) * 4, -1)


def _placed(images: Array, rng: np.random.Generator, end: int) -> Array:
    """Return canvases, each with one image somewhere at the end, the left one if `end` is 0."""
    shape = images.shape[:2]
    rows = rng.integers(CANVAS[0] - SIDE + 1, size=shape)
    columns = rng.integers(_SHIFT, size=shape)
    columns = columns if end == 0 else end - SIDE - columns
    canvases = np.zeros((*shape, *CANVAS), np.float32)
    for four, which in np.ndindex(shape):
        row, column = rows[four, which], columns[four, which]
        canvases[four, which, row : row + SIDE, column : column + SIDE] = images[four, which]
    return canvases
