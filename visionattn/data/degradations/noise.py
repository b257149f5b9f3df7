"""Noise of images and of hyperspectral cubes. Images are float `[C, H, W]` in [0, 1]; nothing is clipped.

They lie on the CPU. All chance comes from a `numpy.random.RandomState`, whose streams never change between
versions: the benchmarks of denoising are defined by the stream of seed 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.random import RandomState
from pydantic import Field
from torch import Tensor

from visionattn.data.degradations.ranges import Probability, Range, draw

HyperspectralKind = Literal["iid", "noniid", "stripe", "deadline", "impulse", "mixture", "complex"]


def gaussian_noise(
    image: Tensor, rng: RandomState, sigma: Range, grey_probability: Probability = 0.0
) -> Tensor:
    """Additive Gaussian noise.

    With a fixed `sigma` and `RandomState(0)` this is the noise of the benchmarks (CBSD68, Kodak24, Set12):
    drawn for an image `[H, W, C]` with its channels in the order blue, green, red.

    Args:
        image: `[C, H, W]`.
        rng: source of chance.
        sigma: standard deviation, or its range, in levels of 255.
        grey_probability: how often all channels receive the same noise.
    """
    level = draw(rng, sigma) / 255
    channels, height, width = image.shape
    grey = grey_probability > 0 and rng.uniform() < grey_probability
    noise = rng.normal(0, level, (height, width, 1 if grey else channels))[..., ::-1]
    return _add(image, np.moveaxis(noise, -1, 0))


def poisson_noise(
    image: Tensor, rng: RandomState, scale: Range = (1.0, 1.0), grey_probability: Probability = 0.0
) -> Tensor:
    """Shot noise as Real-ESRGAN makes it.

    White is as many photons as the image has levels, rounded up to a power of two.

    Args:
        image: `[C, H, W]`.
        rng: source of chance.
        scale: factor of the noise, or its range.
        grey_probability: how often the noise is that of the grey image, the same on all channels.
    """
    factor = draw(rng, scale)
    grey = grey_probability > 0 and rng.uniform() < grey_probability
    clean = image.clamp(0, 1).numpy()
    if grey and len(clean) == 3:
        clean = np.tensordot(np.array([0.2989, 0.587, 0.114]), clean, 1)[None]
    levels = np.round(clean * 255) / 255
    photons = 2.0 ** np.ceil(np.log2(len(np.unique(levels))))
    return _add(image, factor * (rng.poisson(levels * photons) / photons - levels))


def hyperspectral_noise(
    image: Tensor,
    rng: RandomState,
    kind: HyperspectralKind,
    sigma: Annotated[Sequence[Annotated[float, Field(ge=0)]], Field(min_length=1)] = (10, 30, 50, 70),
) -> Tensor:
    """Noise of hyperspectral sensors, as HSDT and its predecessors train and judge (see HSIR).

    Args:
        image: `[bands, H, W]`.
        rng: source of chance.
        kind: iid: one Gaussian level for all bands. All others: a Gaussian level of its own for every band
            (noniid), then damage to a third of the bands: stripe (5 to 15 % of the columns shifted by up to a
            quarter), deadline (so many columns zero), impulse (salt and pepper on 10, 30, 50 or 70 % of the
            pixels); mixture: the three on three different thirds; complex: drawn from noniid, impulse,
            stripe and deadline for every cube.
        sigma: standard deviations to choose from, in levels of 255.
    """
    bands = len(image)
    levels = np.asarray(sigma, dtype=np.float64) / 255
    count = 1 if kind == "iid" else bands
    chosen = levels[rng.randint(0, len(levels), count)] if len(levels) > 1 else np.repeat(levels, count)
    noisy = _add(image, rng.standard_normal(image.shape) * chosen[:, None, None]).numpy()
    if kind == "complex":
        kind = ("noniid", "impulse", "stripe", "deadline")[rng.randint(4)]
    damages = _DAMAGES.get(kind, ())
    order = rng.permutation(bands)
    for damage, part in zip(damages, np.split(order, [bands // 3, 2 * (bands // 3)]), strict=False):
        for band in part[: bands // 3]:
            damage(noisy[band], rng)
    return torch.from_numpy(noisy)


def _stripe(band: np.ndarray, rng: RandomState) -> None:
    columns = _columns(band.shape[1], rng)
    band[:, columns] -= rng.uniform(-0.25, 0.25, len(columns)).astype(band.dtype)


def _deadline(band: np.ndarray, rng: RandomState) -> None:
    band[:, _columns(band.shape[1], rng)] = 0


def _impulse(band: np.ndarray, rng: RandomState) -> None:
    struck = rng.uniform(size=band.shape) < (0.1, 0.3, 0.5, 0.7)[rng.randint(4)]
    band[struck] = rng.randint(0, 2, band.shape)[struck]


_DAMAGES: dict[str, tuple[Callable[[np.ndarray, RandomState], None], ...]] = {
    "stripe": (_stripe,),
    "deadline": (_deadline,),
    "impulse": (_impulse,),
    "mixture": (_stripe, _deadline, _impulse),
}


def _columns(width: int, rng: RandomState) -> np.ndarray:
    """5 to 15 % of the columns, at least one."""
    low, high = max(int(0.05 * width), 1), max(int(0.15 * width), 2)
    return rng.permutation(width)[: rng.randint(low, high)]


def _add(image: Tensor, noise: np.ndarray) -> Tensor:
    # Added in float64 and rounded once, as where numpy's noise meets a float32 image.
    return torch.from_numpy(image.numpy().astype(np.float64) + noise).to(image.dtype)
