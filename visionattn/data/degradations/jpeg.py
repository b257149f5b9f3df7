"""The artefacts of JPEG."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.random import RandomState
from PIL import Image
from torch import Tensor

from visionattn.data.degradations.ranges import QualityRange
from visionattn.data.degradations.resize import to_uint8
from visionattn.data.images import to_pil


def jpeg(image: Tensor, rng: RandomState, quality: QualityRange) -> Tensor:
    """Store an image as JPEG and read it back.

    Pillow and OpenCV, by which the benchmarks are made, both use libjpeg with the same tables and 4:2:0
    chroma: their images are equal to the last bit (compared on nine photographs at six qualities).

    Args:
        image: `[3, H, W]` or `[1, H, W]` in [0, 1]; rounded to 8 bits first.
        rng: source of chance; not used where the quality is fixed.
        quality: a range of 1 to 100, both ends included.

    Returns:
        The same shape, in steps of 1 / 255.

    Raises:
        ValueError: a number of channels other than 1 and 3.
    """
    if len(image) not in (1, 3):
        raise ValueError(f"JPEG has 1 or 3 channels, the image {len(image)}")
    low, high = quality
    chosen = low if low == high else int(rng.randint(low, high + 1))
    content = io.BytesIO()
    to_pil(to_uint8(image)).save(content, format="JPEG", quality=chosen)
    with Image.open(content) as decoded:
        pixels = torch.from_numpy(np.array(decoded))
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]).to(image.dtype) / 255
