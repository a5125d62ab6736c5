"""Non-local means as the non-local operation: the Gaussian form on patches, exactly and over all pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_finite, check_floating, check_int
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.reference.operation import nonlocal_op, weights_of
from nonlocal_core.spec.form import Form

__all__ = ["default_strength", "estimate_noise", "nonlocal_means", "operands", "pixel_weights", "psnr"]

Array = np.ndarray[Any, Any]

_STRENGTH = 1.4
"""The strength in units of the noise of a patch, its standard deviation times the root of its numbers."""

_FARTHEST = float(np.finfo(np.float32).max) / 64
"""What the square of a point stays below, so that float32 holds the scores."""

_NORMAL_QUARTILE = 0.6745
"""The median of |n| for n of the standard normal distribution."""


def nonlocal_means(image: Array, *, strength: float, patch: int = 5, reach: float = 4.0) -> Array:
    """Denoise an image by non-local means over all pairs of its pixels (Buades, Coll and Morel, CVPR 2005).

    Pixel i becomes the mean of all pixels j, weighted by exp(-|p_i - p_j|^2 / h^2 - |q_i - q_j|^2 / s^2):
    p is the patch around a pixel and q its position.

    Args:
        image: `(H, W)` or `(H, W, C)`, floating point.
        strength: h, in the units of the image: the distance of patches at which a weight falls to 1/e.
        patch: the side of a patch, an odd int. Beyond its border the image is mirrored.
        reach: s, in pixels: the distance of positions at which a weight falls to 1/e; `math.inf` for none.

    Returns:
        The denoised image, float64, in the shape of `image`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an argument has a wrong value.

    Example:
        >>> image = np.random.default_rng(0).normal(size=(8, 9))
        >>> bool(nonlocal_means(image, strength=5.0).std() < image.std())
        True
    """
    theta, phi, g = operands(image, strength=strength, patch=patch, reach=reach)
    return np.reshape(nonlocal_op(theta, phi, g), image.shape)


def operands(image: Array, *, strength: float, patch: int = 5, reach: float = 4.0) -> tuple[Array, Array, Array]:
    """Return the theta, phi and g with which `nonlocal_op` is `nonlocal_means`.

    With u = (p / h, q / s) the exponent is -|u_i - u_j|^2 = 2 u_i . u_j - |u_j|^2 - |u_i|^2. The last term is
    the same for all j, so the softmax drops it: theta_i = (2 u_i, 1) and phi_j = (u_j, -|u_j|^2).

    Args:
        image: `(H, W)` or `(H, W, C)`, floating point.
        strength: h.
        patch: the side of a patch.
        reach: s.

    Returns:
        theta and phi `(1, H W, F)` and g `(1, H W, C)`, float64, F = `patch`^2 C + 3.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an argument has a wrong value.

    Example:
        >>> theta, phi, g = operands(np.zeros((8, 9)), strength=0.7)
        >>> theta.shape, phi.shape, g.shape
        ((1, 72, 28), (1, 72, 28), (1, 72, 1))
    """
    check_image(image, patch, strength, reach)
    pixels = np.atleast_3d(image).astype(np.float64)
    height, width, _ = pixels.shape
    q = np.indices((height, width)).reshape(2, -1).T
    u = np.concatenate([_scaled("strength", patches(pixels, patch), strength), _scaled("reach", q, reach)], axis=1)
    # Distances do not see the mean, but the rounding of float32 does.
    u -= u.mean(axis=0)
    theta = np.concatenate([2 * u, np.ones((len(u), 1))], axis=1)
    phi = np.concatenate([u, -np.sum(u**2, axis=1, keepdims=True)], axis=1)
    return theta[None], phi[None], pixels.reshape(1, height * width, -1)


def _scaled(name: str, points: Array, unit: float) -> Array:
    """Return points in a unit in which their distances are numbers of float32."""
    with np.errstate(over="ignore"):
        scaled: Array = points / unit
        if not np.einsum("nf,nf->n", scaled, scaled).max() < _FARTHEST:
            raise fail_value(name, "be so large that the distances in it are finite in float32", unit)
    return scaled


def check_image(image: Array, patch: int, strength: float, reach: float) -> None:
    """Check the arguments of non-local means."""
    if not isinstance(image, np.ndarray):
        raise fail_type("image", "be a NumPy array", image)
    check_floating("image", image.dtype.name)
    if image.ndim not in {2, 3} or image.size == 0:
        raise fail_value("image", "have the shape (H, W) or (H, W, C), none of them 0", f"shape {image.shape}")
    if check_int("patch", patch, "be a positive, odd int") % 2 == 0:
        raise fail_value("patch", "be a positive, odd int", patch)
    if check_finite("strength", strength, "be a positive, finite float") <= 0:
        raise fail_value("strength", "be a positive, finite float", strength)
    if reach != math.inf and check_finite("reach", reach, "be a positive float") <= 0:
        raise fail_value("reach", "be a positive float", reach)


def patches(pixels: Array, side: int) -> Array:
    """Return the patch around each pixel of `(H, W, C)` as a row, `(H W, C side^2)`."""
    radius = side // 2
    padded = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    return windows.reshape(pixels.shape[0] * pixels.shape[1], -1)


def pixel_weights(theta: Array, phi: Array, pixel: int) -> Array:
    """Return the weights of all pixels in the sum for one of them, given by its flat index.

    Args:
        theta: of `operands`.
        phi: of `operands`.
        pixel: the flat index, from 0.

    Returns:
        `(H W,)`; their sum is 1.

    Example:
        >>> theta, phi, _ = operands(np.zeros((3, 3)), strength=1.0)
        >>> weights = pixel_weights(theta, phi, 4)
        >>> int(weights.argmax())
        4
    """
    form = Form("embedded_gaussian", softmax=True, scale=1.0)
    everyone = np.ones((1, 1, phi.shape[1]), dtype=bool)
    weights: Array = weights_of(theta[:, pixel : pixel + 1], phi, form, everyone)[0, 0]
    return weights


def psnr(clean: Array, image: Array) -> float:
    """Return the peak signal-to-noise ratio in dB of an image whose values range from 0 to 1.

    Args:
        clean: the image without noise.
        image: the image to judge, of the same shape.

    Returns:
        10 log10(1 / mean squared error), infinite for equal images.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(psnr(np.zeros((2, 2)), np.full((2, 2), 0.1)), 6)
        20.0
    """
    if clean.shape != image.shape:
        raise fail_value("image", f"have the shape {clean.shape}", f"shape {image.shape}")
    error = float(np.mean((clean - image) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def estimate_noise(image: Array) -> float:
    """Estimate the standard deviation of the noise of an image from its finest details.

    The second difference x_00 - x_01 - x_10 + x_11 of smooth parts is twice the noise; the median disregards
    edges.

    Args:
        image: `(H, W)` or `(H, W, C)`.

    Returns:
        The estimate, 0 for an image with a side of one pixel.

    Example:
        >>> image = np.random.default_rng(0).normal(0.5, 0.1, size=(64, 64))
        >>> round(estimate_noise(image), 2)
        0.1
    """
    details = np.diff(np.diff(image, axis=0), axis=1)
    return float(np.median(np.abs(details))) / 2 / _NORMAL_QUARTILE if details.size else 0.0


def default_strength(noise: float, patch: int, channels: int = 1) -> float:
    """Return the strength h that serves for a noise: 1.4 times that of a whole patch.

    Args:
        noise: the standard deviation of the noise.
        patch: the side of a patch.
        channels: the channels of the image.

    Returns:
        h, in the units of the noise.

    Example:
        >>> round(default_strength(0.1, 5), 6)
        0.7
    """
    return _STRENGTH * noise * patch * math.sqrt(channels)
