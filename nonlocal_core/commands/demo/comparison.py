"""What scikit-image's non-local means gives on the same picture; needs the extra "demo"."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from nonlocal_core.commands.demo.denoise import psnr
from nonlocal_core.commands.demo.measurement import Row

__all__ = ["NOTE", "best_window", "whole_picture"]

Array = np.ndarray[Any, Any]

NOTE = (
    "scikit-image: its best window and strength of several, chosen by the PSNR, for which one must have the "
    "clean picture; over the whole picture the strength that was best on smaller ones."
)

_DISTANCES = (3, 5, 7, 10, 15, 21)

_STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""In units of the noise."""

_STRENGTH_WHOLE = 0.4


def best_window(clean: Array, noisy: Array, noise: float, patch: int) -> Row:
    """Return the run of the highest PSNR among several windows and strengths.

    Args:
        clean: `(H, W, C)` in 0..1.
        noisy: the same with noise.
        noise: the standard deviation of the noise.
        patch: the side of a patch.

    Returns:
        The best run, with the time of that run alone.
    """
    choices = itertools.product(_DISTANCES, _STRENGTHS)
    rows = (_measure(clean, noisy, noise, patch, distance, strength) for distance, strength in choices)
    return max(rows, key=lambda row: row.psnr or 0.0)


def whole_picture(clean: Array, noisy: Array, noise: float, patch: int) -> Row:
    """Return the run whose window holds the whole picture from every pixel.

    Args:
        clean: `(H, W, C)` in 0..1.
        noisy: the same with noise.
        noise: the standard deviation of the noise.
        patch: the side of a patch.

    Returns:
        The run; its time grows with the fourth power of the side of the picture.
    """
    return _measure(clean, noisy, noise, patch, max(clean.shape[:2]) - 1, _STRENGTH_WHOLE)


def _measure(clean: Array, noisy: Array, noise: float, patch: int, distance: int, strength: float) -> Row:
    from skimage.restoration import denoise_nl_means

    start = time.perf_counter()
    image = denoise_nl_means(
        noisy,
        patch_size=patch,
        patch_distance=distance,
        h=strength * noise,
        sigma=noise,
        channel_axis=-1,
    )
    seconds = time.perf_counter() - start
    side = 2 * distance + 1
    return Row(f"scikit-image {side} x {side}", "cpu", seconds, psnr=psnr(clean, image.reshape(clean.shape)))
