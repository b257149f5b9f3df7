"""Pictures of what detectors and segmenters found: boxes, masks and classes in colours over the image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from visionattn.data.decode import as_rgb
from visionattn.data.images import to_pil, to_tensor

_LONG_SIDE = 384  # pixels that smaller images are enlarged to, so that labels can be read
_SWATCH, _FONT_SIZE, _LABEL_HEIGHT = 14, 13, 16
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def class_colour(index: int) -> tuple[int, int, int]:
    """A colour for a class, unlike those of its neighbours: hues in steps of the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, (0.9, 0.65)[index % 2], 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(
    image: Image.Image,
    boxes: Tensor,
    classes: Sequence[int],
    labels: Sequence[str],
    masks: Tensor | None = None,
) -> Image.Image:
    """An image with the boxes, names and masks of objects.

    Args:
        image: RGB.
        boxes: x1, y1, x2, y2 in its pixels, `[N, 4]`.
        classes: the class of each, which decides its colour.
        labels: what is written at each box.
        masks: bool `[N, H, W]`, or None.
    """
    pixels, factor = _enlarged(image)
    colours: list[Any] = [class_colour(index) for index in classes]
    if masks is not None and len(masks):
        at_size = F.interpolate(masks[None].float().cpu(), pixels.shape[-2:], mode="nearest")[0] > 0.5
        pixels = draw_segmentation_masks(pixels, at_size, alpha=0.5, colors=colours)
    picture = to_pil(pixels)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for corners, colour, label in zip((factor * boxes).tolist(), colours, labels, strict=True):
        pen.rectangle(corners, outline=colour, width=2)
        # The name stands on the box, or inside where there is no room above.
        left, bottom = corners[0], max(corners[1], _LABEL_HEIGHT)
        width = font.getlength(label) + 6
        pen.rectangle((left, bottom - _LABEL_HEIGHT, left + width, bottom), fill=colour)
        pen.text((left + 3, bottom - _LABEL_HEIGHT // 2), label, fill=_INK, font=font, anchor="lm")
    return picture


def draw_classes(
    image: Image.Image, classes: Tensor, names: Sequence[str], clear: int | None = None
) -> Image.Image:
    """An image under the colours of its classes, whose names stand below.

    Args:
        image: RGB, of H x W pixels.
        classes: class indices `[H, W]`; those without a name are not coloured.
        names: of the classes.
        clear: a class that is not coloured either, as a background.
    """
    pixels, _ = _enlarged(image)
    at_size = F.interpolate(classes[None, None].float().cpu(), pixels.shape[-2:], mode="nearest")[0, 0].long()
    present: list[int] = [
        index for index in at_size.unique().tolist() if index < len(names) and index != clear
    ]
    if present:
        masks = torch.stack([at_size == index for index in present])
        colours: list[Any] = [class_colour(index) for index in present]
        pixels = draw_segmentation_masks(pixels, masks, alpha=0.6, colors=colours)
    return _with_legend(to_pil(pixels), [(names[index], class_colour(index)) for index in present])


def in_square(image: Image.Image) -> Image.Image:
    """An image in the middle of a white square, as panels of a comparison have it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), _PAPER)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _enlarged(image: Image.Image) -> tuple[Tensor, float]:
    """Pixels uint8 `[3, H, W]` of an image that is not small, and by how much it was enlarged."""
    upright, factor = as_rgb(image), max(1.0, _LONG_SIDE / max(image.size))
    size = round(factor * upright.width), round(factor * upright.height)
    return to_tensor(upright.resize(size, Image.Resampling.BICUBIC)), factor


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    font, line = ImageFont.load_default(_FONT_SIZE), _SWATCH + 6
    places, x, y = [], 4, 3
    for name, _ in entries:
        width = _SWATCH + 16 + round(font.getlength(name))
        if x > 4 and x + width > image.width:
            x, y = 4, y + line
        places.append((x, y))
        x += width
    height = y + line if entries else 0
    picture = Image.new("RGB", (image.width, image.height + height), _PAPER)
    picture.paste(image)
    pen = ImageDraw.Draw(picture)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        top += image.height
        pen.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=colour)
        pen.text((left + _SWATCH + 4, top + _SWATCH // 2), name, fill=_INK, font=font, anchor="lm")
    return picture
