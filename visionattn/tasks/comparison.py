"""Pictures that show images side by side, with labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 12
_FONT_SIZE = 15
_LABEL_HEIGHT = 24
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def draw_comparison(rows: Sequence[Sequence[tuple[str, Image.Image]]], side: int = 256) -> Image.Image:
    """A picture of labelled panels.

    Args:
        rows: label and image of every panel; all rows have the same number of panels.
        side: side of a panel in pixels. Images are enlarged to it without any smoothing.

    Returns:
        RGB, one row below the other, each label above its panel.
    """
    columns = len(rows[0])
    step_x, step_y = side + _MARGIN, _LABEL_HEIGHT + side + _MARGIN
    picture = Image.new("RGB", (_MARGIN + columns * step_x, _MARGIN // 2 + len(rows) * step_y), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for row, panels in enumerate(rows):
        for column, (label, image) in enumerate(panels):
            x, y = _MARGIN + column * step_x, _MARGIN // 2 + row * step_y
            pen.text((x, y + _LABEL_HEIGHT // 2), label, fill=_INK, font=font, anchor="lm")
            enlarged = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            picture.paste(enlarged, (x, y + _LABEL_HEIGHT))
    return picture


def busiest_crop(detail: Tensor, side: int, multiple: int) -> tuple[int, int]:
    """Where a square of `side` pixels holds the most of `detail` `[H, W]`.

    Returns:
        Its top and left, both multiples of `multiple` pixels.
    """
    sums = F.avg_pool2d(detail[None, None].float(), side, stride=multiple)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return top * multiple, left * multiple
