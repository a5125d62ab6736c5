"""Non-local means through the non-local operation, against its definition."""

import itertools
import math

import numpy as np
import pytest

from nonlocal_core.commands.demo.denoise import (
    default_strength,
    estimate_noise,
    nonlocal_means,
    operands,
    pixel_weights,
    psnr,
)

SHAPES = {"grey": (6, 7), "one channel": (7, 6, 1), "colour": (5, 6, 3), "smaller than a patch": (2, 3)}


def photograph(shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape)


def weights_by_definition(image, strength, patch, reach):
    """Return the weights of all pixels for all pixels, from one pair of patches at a time."""
    pixels = np.atleast_3d(image)
    height, width, _ = pixels.shape
    radius = patch // 2
    padded = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    places = list(itertools.product(range(height), range(width)))
    weights = np.zeros((len(places), len(places)))
    for (i, (a, b)), (j, (c, d)) in itertools.product(enumerate(places), enumerate(places)):
        here, there = padded[a : a + patch, b : b + patch], padded[c : c + patch, d : d + patch]
        far = ((a - c) ** 2 + (b - d) ** 2) / reach**2
        weights[i, j] = math.exp(-np.sum((here - there) ** 2) / strength**2 - far)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("patch", [1, 3, 5])
@pytest.mark.parametrize("reach", [1.5, 4.0, math.inf])
def test_it_is_the_mean_that_the_definition_gives(shape, patch, reach):
    image = photograph(shape)
    weights = weights_by_definition(image, 0.6, patch, reach)
    expected = (weights @ image.reshape(len(weights), -1)).reshape(shape)
    result = nonlocal_means(image, strength=0.6, patch=patch, reach=reach)
    assert result.shape == image.shape
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("pixel", [0, 17, 41])
def test_the_weights_of_a_pixel_are_those_of_the_definition(pixel):
    image = photograph((6, 7))
    theta, phi, _ = operands(image, strength=0.6, patch=3, reach=2.0)
    row = pixel_weights(theta, phi, pixel)
    np.testing.assert_allclose(row, weights_by_definition(image, 0.6, 3, 2.0)[pixel], rtol=1e-12)
    assert row.sum() == pytest.approx(1)


def test_an_image_in_float32_is_computed_in_float64():
    image = photograph((6, 7)).astype("float32")
    expected = nonlocal_means(image.astype("float64"), strength=0.6)
    np.testing.assert_array_equal(nonlocal_means(image, strength=0.6), expected)


def test_the_input_is_left_as_it_is():
    image = photograph((6, 7, 3))
    nonlocal_means(image, strength=0.6)
    np.testing.assert_array_equal(image, photograph((6, 7, 3)))


def test_features_lose_little_in_float32():
    image = photograph((24, 24)) + 100
    theta, phi, _ = operands(image, strength=0.7)
    narrow = theta[0].astype("float32") @ phi[0].astype("float32").T
    np.testing.assert_allclose(narrow, theta[0] @ phi[0].T, atol=2e-5)


def test_denoising_a_noisy_step_removes_most_of_the_noise():
    clean = np.repeat([[0.2, 0.8]], 16, axis=1).repeat(32, axis=0)
    noisy = clean + np.random.default_rng(0).normal(scale=0.1, size=clean.shape)
    denoised = nonlocal_means(noisy, strength=default_strength(0.1, 5))
    assert psnr(clean, denoised) > psnr(clean, noisy) + 8


WRONG = {
    "no array": ([[0.0]], {}, TypeError, "`image` must be a NumPy array"),
    "ints": (np.zeros((2, 2), int), {}, TypeError, "`image` must"),
    "one axis": (np.zeros(4), {}, ValueError, r"`image` must have the shape .*Got shape \(4,\)"),
    "four axes": (np.zeros((1, 2, 2, 1)), {}, ValueError, "`image` must have the shape"),
    "empty": (np.zeros((0, 4)), {}, ValueError, "`image` must have the shape"),
    "even patch": (np.zeros((2, 2)), {"patch": 4}, ValueError, "`patch` must be a positive, odd int. Got 4"),
    "no patch": (np.zeros((2, 2)), {"patch": 0}, ValueError, "`patch` must be a positive, odd int. Got 0"),
    "half a patch": (np.zeros((2, 2)), {"patch": 2.5}, TypeError, "`patch` must be a positive, odd int"),
    "no strength": (np.zeros((2, 2)), {"strength": 0}, ValueError, "`strength` must be a positive, finite"),
    "too strong": (
        np.zeros((2, 2)),
        {"strength": math.inf},
        ValueError,
        "`strength` must be a positive, fin",
    ),
    "no reach": (np.zeros((2, 2)), {"reach": 0.0}, ValueError, "`reach` must be a positive float. Got 0.0"),
    "reach nan": (np.zeros((2, 2)), {"reach": math.nan}, ValueError, "`reach` must be a positive float"),
    "reach in words": (np.zeros((2, 2)), {"reach": "far"}, TypeError, "`reach` must be a positive float"),
}


@pytest.mark.parametrize(("image", "options", "kind", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_refused_by_name(image, options, kind, words):
    with pytest.raises(kind, match=words):
        nonlocal_means(image, **{"strength": 0.6, **options})


def test_psnr_of_equal_images_is_infinite():
    assert psnr(np.ones((2, 3)), np.ones((2, 3))) == math.inf


def test_psnr_does_not_broadcast():
    with pytest.raises(ValueError, match=r"`image` must have the shape \(4, 4, 1\). Got shape \(4, 4\)"):
        psnr(np.zeros((4, 4, 1)), np.zeros((4, 4)))


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
def test_noise_is_estimated_in_spite_of_slopes_and_edges(noise, channels):
    ramp = np.add.outer(np.linspace(0, 0.5, 96), np.linspace(0, 0.3, 80)) + (np.arange(80) > 30) * 0.4
    image = ramp.reshape(96, 80, *([1] * len(channels))) + np.random.default_rng(0).normal(
        scale=noise, size=(96, 80, *channels)
    )
    assert estimate_noise(image) == pytest.approx(noise, rel=0.06)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1, 3)])
def test_noise_of_a_line_of_pixels_counts_as_none(shape):
    assert estimate_noise(photograph(shape)) == 0


def test_strength_grows_with_the_number_of_values_in_a_patch():
    assert default_strength(0.1, 5) == pytest.approx(0.7)
    assert default_strength(0.1, 7, 4) == pytest.approx(1.4 * 0.1 * 14)
