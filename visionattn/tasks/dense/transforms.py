"""Augmentations of images with boxes, masks and class maps that torchvision's `transforms.v2` does not have.

All chance comes from torch's generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


class RandomScale(nn.Module):
    """Resizes by a random factor.

    Args:
        scale: least and largest factor.
        short_side: of the image before, in pixels; None keeps its own.
        long_side: largest of the image before; the factor applies to it too.
    """

    def __init__(
        self, scale: tuple[float, float], short_side: int | None = None, long_side: int | None = None
    ) -> None:
        super().__init__()
        self.scale, self.short_side, self.long_side = scale, short_side, long_side

    def forward(self, *inputs: Any) -> Any:
        """Image and whatever belongs to it, resized alike."""
        factor = float(torch.empty(()).uniform_(*self.scale))
        height, width = functional.get_size(inputs[0])
        size = fitted_size(height, width, self.short_side, self.long_side, factor)
        return inputs if size == (height, width) else v2.Resize(size, antialias=True)(*inputs)


class RandomSizedCrop(nn.Module):
    """A crop of random height and width, as the recipes that follow DETR have it.

    Args:
        sides: least and largest side in pixels; the image's own where it is smaller.
    """

    def __init__(self, sides: tuple[int, int]) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, *inputs: Any) -> Any:
        """Image and whatever belongs to it, cut alike."""
        low, high = self.sides
        size = [
            int(torch.randint(min(side, low), min(side, high) + 1, ()))
            for side in functional.get_size(inputs[0])
        ]
        return v2.RandomCrop(size)(*inputs)


class VariedCrop(nn.Module):
    """A random crop in which no class has more than a share of the labelled pixels, if ten tries find one.

    Args:
        size: side of the crop in pixels; what an image lacks is black and without a class.
        max_share: the largest share.
        ignored: value of pixels without a class.
    """

    def __init__(self, size: int, max_share: float, ignored: int) -> None:
        super().__init__()
        self.crop = v2.RandomCrop(size, pad_if_needed=False)
        self.size, self.max_share, self.ignored = size, max_share, ignored

    def forward(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """`tv_tensors` `[3, H, W]` and `[H, W]` to `[3, size, size]` and `[size, size]`."""
        height, width = classes.shape[-2:]
        missing = [0, 0, max(0, self.size - width), max(0, self.size - height)]
        if any(missing):
            image = functional.pad(image, missing)
            classes = functional.pad(classes, missing, fill=self.ignored)
        for _ in range(10 if self.max_share < 1 else 1):
            cut_image, cut_classes = self.crop(image, classes)
            counts = cut_classes.as_subclass(Tensor).flatten().bincount()
            counts[self.ignored : self.ignored + 1] = 0
            if counts.max() < self.max_share * counts.sum():
                break
        return cut_image, cut_classes  # pyright: ignore[reportPossiblyUnboundVariable]


def fitted_size(
    height: int, width: int, short_side: int | None, long_side: int | None, factor: float = 1.0
) -> tuple[int, int]:
    """Height and width of an image resized so that its shorter side is `short_side`, times a factor.

    The longer side stays below `long_side`, times the factor; None does not bound it. None for the shorter
    side keeps the size.
    """
    scale = 1.0 if short_side is None else short_side / min(height, width)
    if long_side is not None:
        scale = min(scale, long_side / max(height, width))
    return max(1, round(height * scale * factor)), max(1, round(width * scale * factor))


def plain(value: Any) -> Any:
    """A `tv_tensors` value, or a dict of such, as plain tensors."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


def listed(samples: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Samples of different sizes as a batch: a list of each of their parts."""
    return tuple(list(part) for part in zip(*samples, strict=True))
