"""Convolutions of volumes `[B, D, H, W, C]`, maps of several spectral bands, as fast as those of maps.

Paper: "Hybrid Spectral Denoising Transformer with Guided Attention", https://arxiv.org/abs/2303.09040.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.layers.as_made import is_as_made, joining_axes
from visionattn.layers.bands import convolved

_ONEDNN = torch.backends.mkldnn.is_available()


class VolumeConv(nn.Conv3d):
    """A 3x3x3 convolution, for volumes that are channels last.

    Small single images would be unfolded on a CPU, 27 times their size: they run as maps with the channels of
    three bands each.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, D, H, W]` to `[B, C', D, H', W']`."""
        # A pass that is counted on the meta device may run on a CPU.
        if torch.compiler.is_compiling() or input.device.type not in ("cpu", "meta") or not _unfolds(input):
            return super().forward(input)
        x = input.permute(0, 2, 3, 4, 1)
        near = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
        three = torch.cat((near[:, :-2], x, near[:, 2:]), -1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        y = _on_maps(lambda maps: F.conv2d(maps, weight, self.bias, self.stride[1:], padding=1), three)
        return y.permute(0, 4, 1, 2, 3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VolumeConv:
        return super()._apply(joining_axes(fn), recurse)


def on_ndhwc(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution or norm of volumes on `[B, D, H, W, C]`; the permutations are views."""
    return module(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class SpectralSpatialConv(nn.Module):
    """S3Conv: two 3x3 convolutions of every band, plus a convolution along three bands of the same input.

    Both run as 2-D convolutions on channels-last memory, the spectral one on maps of bands by pixels: on a
    CPU it takes a fifth of the time of a 3-D convolution.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spatial1 = nn.Conv2d(in_dim, dim, 3, padding=1, bias=False, **dd)
        self.spatial2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.act = nn.LeakyReLU()
        self.spectral = nn.Conv2d(in_dim, dim, (3, 1), padding=(1, 0), bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, H, W, in_dim]` to `[B, D, H, W, dim]`."""
        y = _on_maps(lambda maps: self._activated(self.spatial2(self._activated(self.spatial1(maps)))), x)
        z = self.spectral(x.flatten(2, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y + z.reshape(y.shape)

    def _activated(self, maps: Tensor) -> Tensor:
        # In place, unless backward hooks of the convolution make a view of its output.
        inplace = is_as_made(nn.LeakyReLU, self.act) and maps._base is None
        return F.leaky_relu(maps, self.act.negative_slope, inplace) if inplace else self.act(maps)

    def on_map(self, x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        """`then` of the output, by bands."""
        return convolved(lambda rows: then(self(rows)), x, halo=2, dim=2)


class DownConv(nn.Module):
    """3-D convolution that halves the sides of the maps and doubles their channels."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = VolumeConv(dim, 2 * dim, 3, stride=(1, 2, 2), padding=1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, H, W, C]` to `[B, D, H / 2, W / 2, 2 * C]`."""
        return on_ndhwc(self.conv, x)

    def on_map(self, x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        """`then` of the output, by bands."""
        return convolved(lambda rows: then(self(rows)), x, halo=2, scale=Fraction(1, 2), dim=2)


class UpConv(nn.Module):
    """Linear enlargement of the maps to twice their sides, then a 3-D convolution to half the channels."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = VolumeConv(dim, dim // 2, 3, padding=1, bias=False, **dd)

    def forward(self, x: Tensor, places: Tensor | None = None, height: int | None = None) -> Tensor:
        """`[B, D, H, W, C]` to `[B, D, 2 * H, 2 * W, C / 2]`.

        Args:
            x: a map, or a band of its rows.
            places: `[rows]`, which rows of the map these are, if `x` is a band.
            height: rows of the map, if `x` is a band.
        """
        rows, columns = x.shape[2:4]
        if places is not None and height is not None and height != rows:
            x = _double_rows(x, places, height)
        size = (x.shape[1], 2 * rows, 2 * columns)
        # On channels-last memory, that of volumes is three times as fast as that of maps.
        x = F.interpolate(x.permute(0, 4, 1, 2, 3), size, mode="trilinear", align_corners=True)
        return self.conv(x).permute(0, 2, 3, 4, 1)

    def on_map(self, x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
        """`then` of the output, by bands."""
        height = x.shape[2]
        places = torch.arange(height, device=x.device)[None, None]

        def enlarge(rows: Tensor, places: Tensor) -> Tensor:
            return then(self(rows, places[0, 0], height))

        return convolved(enlarge, x, places, halo=2, scale=2, dim=2)


def _on_maps(function: Any, x: Tensor) -> Tensor:
    """A 2-D operation on every band of `[B, D, H, W, C]`; the permutations are views of its memory."""
    y = function(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y.unflatten(0, x.shape[:2])


def _unfolds(x: Tensor) -> bool:
    """Whether PyTorch on a CPU convolves `[B, C, D, H, W]` as a volume without oneDNN."""
    batch, channels, bands, height, _ = x.shape
    return not _ONEDNN or (batch == 1 and bands * height * channels <= 20480)


def _double_rows(x: Tensor, places: Tensor, height: int) -> Tensor:
    """Linear enlargement along rows of a band `[B, D, rows, W, C]` of a map, its corners being aligned.

    The numbers are those of `F.interpolate` on the whole map, which places the output rows in float32. Rows
    that need others than those of the band, `places` `[rows]`, are wrong.
    """
    rows = torch.stack((2 * places, 2 * places + 1), 1).flatten().float()
    rows = rows * (torch.tensor(float(height - 1), device=x.device) / (2 * height - 1))
    upper = rows.floor()
    upper_rows, lower_rows = (
        x.index_select(2, (index.long() - places[0]).clamp(0, x.shape[2] - 1)) for index in (upper, upper + 1)
    )
    return torch.lerp(upper_rows, lower_rows, (rows - upper).to(x.dtype)[:, None, None])
