"""What every restoration network states about itself, and the padding that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from timm.models import build_model_with_cfg
from torch import Tensor

RestorationTask = Literal[
    "super-resolution", "denoising", "jpeg", "dehazing", "deblurring", "hyperspectral-denoising"
]


@dataclass(frozen=True)
class RestorationInfo:
    """The facts that tools need to run a restoration network on any image; a network's `info` attribute.

    Attributes:
        task: what the network was made for.
        upscale: output side / input side.
        channels: image channels in and out.
        min_size: smallest input side in pixels.
        size_multiple: the input is padded inside the network to a multiple of this many pixels.
        exact_tiling: whether overlapping tiles can give the whole-image result (no global operation).
        half_safe: whether float16 is safe; published float16 failures make this False.
        bfloat16_safe: whether bfloat16 autocast is safe.
    """

    task: RestorationTask
    upscale: int = 1
    channels: int = 3
    min_size: int = 1
    size_multiple: int = 1
    exact_tiling: bool = True
    half_safe: bool = False
    bfloat16_safe: bool = True


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Reflect-pad `x` `[B, C, H, W]` on the right and bottom to a multiple of `multiple` pixels.

    Raises:
        ValueError: a side is too small to be reflected that far.
    """
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if bottom >= height or right >= width:
        raise ValueError(
            f"an input of {height}x{width} cannot be reflected to a multiple of {multiple}: "
            f"each side must be at least {multiple // 2 + 1} pixels"
        )
    return F.pad(x, (0, right, 0, bottom), mode="reflect") if bottom or right else x


def build_restoration(model_cls: type, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg` for a network without a classifier."""
    classifier_options: Any = ("num_classes", "global_pool")
    return build_model_with_cfg(model_cls, variant, pretrained, kwargs_filter=classifier_options, **kwargs)
