"""Decoders of semantic segmentation, with the parameter names and the numbers of MMSegmentation's.

UPerNet (https://arxiv.org/abs/1807.10221), Semantic FPN (https://arxiv.org/abs/1901.02446) over a pyramid
(https://arxiv.org/abs/1612.03144), and the small FCN head that helps the training of the former
(https://arxiv.org/abs/1411.4038). Maps are resized bilinearly without aligned corners, except in the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1


class ConvModule(nn.Module):
    """A convolution that keeps the size, then by default batch norm and ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        kernel: kernel size.
        norm: False leaves out norm and ReLU, and gives the convolution a bias.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(channels) if norm else None
        if norm:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, channels, H, W]`."""
        x = self.conv(x)
        return x if self.bn is None else F.relu(self.bn(x))


class FPN(nn.Module):
    """A feature pyramid without norms: every map gets the coarser ones, enlarged to the nearest pixel, added.

    Args:
        in_channels: channels of the maps, the finest first.
        channels: channels of the outputs.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, channels, 1, norm=False) for width in in_channels
        )
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm=False) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps `[B, C_i, H_i, W_i]`, the finest first, to maps `[B, channels, H_i, W_i]`."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:])
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]


class Head(nn.Module):
    """Classify every pixel: dropout of whole channels, then a linear layer.

    Args:
        channels: channels before the classifier.
        num_classes: classes.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(DROPOUT)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # pyright: ignore[reportArgumentType]

    def classify(self, x: Tensor) -> Tensor:
        """Features `[B, channels, H, W]` to logits `[B, num_classes, H, W]`."""
        return self.conv_seg(self.dropout(x))


class UPerHead(Head):
    """UPerNet: a pyramid of means over the coarsest map, then a feature pyramid, all levels side by side.

    In training it needs at least two images per batch, because of the norm after the mean over a whole map.

    Args:
        in_channels: channels of the maps, the finest first.
        channels: channels within the head.
        num_classes: classes.
        pool_scales: the coarsest map is averaged to grids of so many cells per side.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__(channels, num_classes)
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(coarsest, channels, 1))
            for scale in pool_scales
        )
        self.bottleneck = ConvModule(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[B, C_i, H_i, W_i]`, the finest first, to logits `[B, num_classes, H_0, W_0]`."""
        *finer, coarsest = maps
        means = [resize(pool(coarsest), coarsest) for pool in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([coarsest, *means], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        side_by_side = torch.cat([outputs[0], *(resize(x, outputs[0]) for x in outputs[1:])], 1)
        return self.classify(self.fpn_bottleneck(side_by_side))


class FPNHead(Head):
    """Semantic FPN: every level of a feature pyramid is brought to the finest in steps of two, and added.

    Args:
        in_channels: channels of the levels, the finest first.
        strides: their strides in pixels.
        channels: channels within the head.
        num_classes: classes.
    """

    def __init__(
        self, in_channels: Sequence[int], strides: Sequence[int], channels: int, num_classes: int
    ) -> None:
        super().__init__(channels, num_classes)
        self.scale_heads = nn.ModuleList()
        for width, stride in zip(in_channels, strides, strict=True):
            steps: list[nn.Module] = []
            for i in range(max(1, int(math.log2(stride / strides[0])))):
                steps.append(ConvModule(channels if i else width, channels, 3))
                if stride != strides[0]:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*steps))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Levels `[B, C_i, H_i, W_i]`, the finest first, to logits `[B, num_classes, H_0, W_0]`."""
        out, *others = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        for x in others:
            out = out + resize(x, out)
        return self.classify(out)


class FCNHead(Head):
    """One convolution and the classifier on a single map.

    Args:
        in_channels: channels of the map.
        channels: channels within the head.
        num_classes: classes.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """A map `[B, in_channels, H, W]` to logits `[B, num_classes, H, W]`."""
        return self.classify(self.convs(x))


def resize(x: Tensor, like: Tensor | tuple[int, int]) -> Tensor:
    """`x` `[B, C, h, w]` at the height and width of another map, or at a given one."""
    size = (like.shape[2], like.shape[3]) if isinstance(like, Tensor) else like
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
