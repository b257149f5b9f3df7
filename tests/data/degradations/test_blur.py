from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from scipy import ndimage, special

from visionattn.data.degradations.blur import (
    blur,
    blur_kernel,
    filter_image,
    random_kernel,
    sharpen,
    sinc_kernel,
)


def moments(kernel: np.ndarray) -> np.ndarray:
    axis = np.arange(len(kernel)) - len(kernel) // 2
    x, y = np.meshgrid(axis, axis)
    return np.array([[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)])


def test_gaussian_kernels_have_their_covariance():
    kernel = blur_kernel(21, (1.5, 3.0), angle=0.4)
    rotation = np.array([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    expected = rotation @ np.diag([1.5**2, 3.0**2]) @ rotation.T
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(moments(kernel), expected, rtol=0.02)


def test_shapes_follow_their_formulas():
    q = (np.arange(-5, 6)[:, None] / 2.0) ** 2 + (np.arange(-5, 6)[None] / 2.0) ** 2
    for shape, weights in (("generalized", np.exp(-0.5 * q**1.7)), ("plateau", 1 / (1 + q**1.7))):
        kernel = blur_kernel(11, (2.0, 2.0), 0.3, shape, 1.7)  # type: ignore[arg-type]
        np.testing.assert_allclose(kernel, weights / weights.sum(), rtol=1e-12)
    np.testing.assert_allclose(
        blur_kernel(7, (1.0, 2.0), 0.2, "generalized", 1.0), blur_kernel(7, (1.0, 2.0), 0.2)
    )


def test_sinc_is_the_low_pass_filter():
    cutoff = 1.3
    axis = np.arange(-10, 11)
    radius = np.hypot(axis[:, None], axis[None])
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = cutoff * special.j1(cutoff * radius) / (2 * np.pi * radius)
    weights[10, 10] = cutoff**2 / (4 * np.pi)
    np.testing.assert_allclose(sinc_kernel(21, cutoff), weights / weights.sum(), rtol=1e-5, atol=1e-9)
    # It keeps frequencies below the cutoff and removes those above.
    spectrum = np.abs(np.fft.fft2(np.pad(sinc_kernel(21, cutoff), 50)))[0]
    frequencies = 2 * np.pi * np.fft.fftfreq(len(spectrum))
    assert spectrum[np.abs(frequencies) < 0.8].min() > 0.8
    assert spectrum[np.abs(frequencies) > 1.9].max() < 0.2


def test_random_kernels():
    rng = RandomState(0)
    kernels = [random_kernel(rng) for _ in range(400)]
    assert {len(kernel) for kernel in kernels} == set(range(7, 22, 2))
    assert all(kernel.sum() == pytest.approx(1) for kernel in kernels)
    # Only sinc kernels have negative weights; they come one time in ten.
    assert np.mean([kernel.min() < -1e-6 for kernel in kernels]) == pytest.approx(0.1, abs=0.04)
    again = random_kernel(RandomState(5))
    np.testing.assert_array_equal(again, random_kernel(RandomState(5)))


def test_filtering_equals_scipy():
    image = torch.rand(3, 30, 25)
    kernel = RandomState(0).rand(7, 7)
    kernel /= kernel.sum()
    ours = filter_image(image, kernel)
    for plane, expected in zip(ours, image.double().numpy()):
        np.testing.assert_allclose(plane, ndimage.correlate(expected, kernel, mode="mirror"), atol=1e-6)
    constant = torch.full((3, 5, 6), 0.3)  # smaller than the kernel
    torch.testing.assert_close(blur(constant, RandomState(0)), constant)


def test_sharpening_steepens_edges_and_keeps_flat_parts():
    edge = torch.full((1, 40, 120), 0.4)
    edge[..., 60:] = 0.6
    sharp = sharpen(edge)
    assert sharp[0, 20, 59] < 0.375
    assert sharp[0, 20, 60] > 0.625
    torch.testing.assert_close(sharp[..., :5], edge[..., :5], atol=1e-6, rtol=0)
    weak = 0.5 + (edge - 0.5) * 0.1  # differs from its blur by less than the threshold
    torch.testing.assert_close(sharpen(weak), weak, atol=1e-6, rtol=0)
    # Against the formula with scipy's filters.
    image = torch.rand(64, 70, dtype=torch.float64).numpy()
    axis = np.arange(51) - 25
    gaussian = np.exp(-(axis**2) / 128)
    gaussian /= gaussian.sum()

    def soft(x: np.ndarray) -> np.ndarray:
        return ndimage.correlate1d(
            ndimage.correlate1d(x, gaussian, 0, mode="mirror"), gaussian, 1, mode="mirror"
        )

    mask = soft((np.abs(image - soft(image)) * 255 > 10).astype(float))
    expected = mask * np.clip(image + 0.5 * (image - soft(image)), 0, 1) + (1 - mask) * image
    np.testing.assert_allclose(sharpen(torch.from_numpy(image)[None])[0], expected, atol=1e-9)
