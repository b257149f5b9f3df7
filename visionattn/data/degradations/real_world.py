"""Second-order degradations of real photographs: Real-ESRGAN (Wang et al., 2021, arXiv 2107.10833).

Blur, resizing, noise and JPEG, twice; then the final size and a sinc filter, before or after the last JPEG.
The defaults are those of Real-ESRGAN x4 and of HAT's real-world variants. Every sample is degraded by itself,
so the pool of 180 samples that the original needs for variety within a batch has no counterpart here.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch.nn.functional as F
from numpy.random import RandomState
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from visionattn.data.degradations.blur import KERNEL_SIZES, filter_image, random_kernel, sharpen, sinc_kernel
from visionattn.data.degradations.jpeg import jpeg
from visionattn.data.degradations.noise import gaussian_noise, poisson_noise
from visionattn.data.degradations.ranges import Probability, QualityRange, Range

_MODES = ("area", "bilinear", "bicubic")


class Stage(BaseModel):
    """One round of blur, resizing, noise and JPEG; the defaults are those of the first round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blur_probability: Probability = 1.0
    blur_sigma: Range = (0.2, 3.0)
    sinc_probability: Probability = 0.1
    resize: tuple[Probability, Probability, Probability] = Field(
        default=(0.2, 0.7, 0.1), description="probabilities of enlarging, reducing and keeping"
    )
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]] = (0.15, 1.5)
    gaussian_probability: Probability = Field(default=0.5, description="otherwise Poisson noise")
    sigma: Range = (1.0, 30.0)
    poisson_scale: Range = (0.05, 3.0)
    grey_probability: Probability = 0.4
    quality: QualityRange = (30, 95)


class SecondStage(Stage):
    """The second round, with its own defaults."""

    blur_probability: Probability = 0.8
    blur_sigma: Range = (0.2, 1.5)
    resize: tuple[Probability, Probability, Probability] = (0.3, 0.4, 0.3)
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]] = (0.3, 1.2)
    sigma: Range = (1.0, 25.0)
    poisson_scale: Range = (0.05, 2.5)


def real_world(
    image: Tensor,
    rng: RandomState,
    upscale: int,
    first: Stage = Stage(),  # noqa: B008  (frozen)
    second: SecondStage = SecondStage(),  # noqa: B008
    final_sinc_probability: Probability = 0.8,
    sharpened: bool = True,
) -> Tensor:
    """The input of blind super-resolution for a true image.

    Args:
        image: `[3, H, W]` in [0, 1], both sides multiples of `upscale`.
        rng: source of chance.
        upscale: side of the truth / side of the input.
        first: the first round.
        second: the second round, whose sizes count from that of the input.
        final_sinc_probability: how often the final filter is applied.
        sharpened: start from the image after unsharp masking.

    Returns:
        `[3, H / upscale, W / upscale]` in [0, 1], in steps of 1 / 255.
    """
    height, width = image.shape[-2:]
    target = (height // upscale, width // upscale)
    x = sharpen(image) if sharpened else image
    x = _blur(x, rng, first)
    x = _resize(x, (height, width), _scale(rng, first), rng)
    x = jpeg(_noise(x, rng, first), rng, first.quality)
    x = _blur(x, rng, second)
    x = _resize(x, target, _scale(rng, second), rng)
    x = _noise(x, rng, second)
    kernel = None
    if rng.uniform() < final_sinc_probability:
        kernel = sinc_kernel(KERNEL_SIZES[rng.randint(len(KERNEL_SIZES))], rng.uniform(math.pi / 3, math.pi))
    jpeg_last = rng.uniform() < 0.5
    if not jpeg_last:
        x = jpeg(x, rng, second.quality)
    x = _resize(x, target, 1.0, rng)
    x = x if kernel is None else filter_image(x, kernel)
    if jpeg_last:
        x = jpeg(x, rng, second.quality)
    return (x.clamp(0, 1) * 255).round() / 255


def _blur(x: Tensor, rng: RandomState, stage: Stage) -> Tensor:
    kernel = random_kernel(rng, stage.blur_sigma, stage.sinc_probability)
    return filter_image(x, kernel) if rng.uniform() < stage.blur_probability else x


def _scale(rng: RandomState, stage: Stage) -> float:
    total = sum(stage.resize)
    way = int(rng.choice(3, p=[p / total for p in stage.resize]))
    return (rng.uniform(1, stage.scale[1]), rng.uniform(stage.scale[0], 1), 1.0)[way]


def _resize(x: Tensor, size: tuple[int, int], scale: float, rng: RandomState) -> Tensor:
    """`x` at `scale` times `size`, by one of three ways of interpolation."""
    mode = _MODES[rng.randint(3)]
    height, width = (max(int(side * scale), 1) for side in size)
    return F.interpolate(x[None], (height, width), mode=mode)[0]


def _noise(x: Tensor, rng: RandomState, stage: Stage) -> Tensor:
    if rng.uniform() < stage.gaussian_probability:
        return gaussian_noise(x, rng, stage.sigma, stage.grey_probability).clamp(0, 1)
    return poisson_noise(x, rng, stage.poisson_scale, stage.grey_probability).clamp(0, 1)
