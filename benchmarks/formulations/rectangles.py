"""RGT's and CRAFT's attention in rectangle windows: from rows of pixels to planes, to windows, to heads."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.linear_hosts import windows_of_planes
from benchmarks.formulations.windows import merge, partition
from visionattn.layers.windows.rectangle_window import DynamicPositionBias, RectangleWindowAttention

Size = tuple[int, int]
# The maps of training, whose masks the authors' networks store.
_STORED = (64, 64)


class TheirRectangleAttention(RectangleWindowAttention):
    """Both kinds of windows on a whole map."""

    def forward(self, x: Tensor, top: int | None = None, height: int | None = None) -> Tensor:
        """`[B, H, W, C]` to the same; `top` and `height` are for bands and not used."""
        batch, rows, columns, dim = x.shape
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, dim)).permute(2, 0, 1, 3)
        values = qkv[2].transpose(1, 2).contiguous().unflatten(2, (rows, columns))
        if self.mask_shift:  # RGT
            fill = [-side % max(self.windows[0]) for side in (rows, columns)]
            planes = qkv.reshape(-1, rows, columns, dim).permute(0, 3, 1, 2)
            planes = F.pad(planes, (0, fill[1], 0, fill[0]))
            size = (planes.shape[2], planes.shape[3])
            qkv = planes.flatten(2).unflatten(0, (3, batch)).transpose(2, 3)
        else:
            size = (rows, columns)
        out = []
        for half, window, bias in zip(qkv.chunk(2, -1), self.windows, self.position_bias):
            shift = (window[0] // 2, window[1] // 2)
            mask = None
            if self.shifted:
                if self.mask_shift:
                    stored = size == _STORED
                    mask = (_stored_mask if stored else shift_mask)(size, window, shift, x.device)
                half = half.unflatten(2, size).roll((-shift[0], -shift[1]), (2, 3)).flatten(2, 3)
            attended = _attend(half, size, window, self.num_heads // 2, bias, mask)
            out.append(attended.roll(shift, (1, 2)) if self.shifted else attended)
        tokens = torch.cat([t[:, :rows, :columns].reshape(batch, -1, dim // 2) for t in out], 2)
        local = self.lepe(values).permute(0, 2, 3, 1).contiguous().flatten(1, 2)
        return self.proj(tokens + local).unflatten(1, (rows, columns))


def _attend(
    qkv: Tensor, size: Size, window: Size, heads: int, bias: torch.nn.Module, mask: Tensor | None
) -> Tensor:
    """`[B, H, W, C]` of `[3, B, H * W, C]`."""
    batch, dim = qkv.shape[1], qkv.shape[-1]
    q, k, v = (_windows(x, size, window).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for x in qkv)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + position_bias(bias, window)
    if mask is not None:
        logits = (logits.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, -1, window[0] * window[1], dim)
    return merge(out, window, *size).contiguous()


def _windows(x: Tensor, size: Size, window: Size) -> Tensor:
    """Windows `[B * windows, pixels, C]` of `[B, H * W, C]`, by way of planes."""
    return windows_of_planes(x.transpose(1, 2).contiguous().unflatten(2, size), window)


def position_bias(module: torch.nn.Module, window: Size) -> Tensor:
    """`[heads, pixels, pixels]`: the MLP runs on all offsets, also where its width of 1 makes it constant."""
    assert isinstance(module, DynamicPositionBias)
    weight = module.pos_proj.weight
    with torch.inference_mode(False):
        offsets, index = _offsets(window, weight.device)
    table = module.pos3(module.pos2(module.pos1(module.pos_proj(offsets.to(weight.dtype)))))
    pixels = window[0] * window[1]
    return table[index.flatten()].view(pixels, pixels, -1).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=8)
def _offsets(window: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """All offsets `[n, 2]`, query minus key, and which of them every pair has; stored buffers."""
    sides = [torch.arange(1 - side, side, device=device) for side in window]
    offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1).float()
    y, x = (torch.arange(side, device=device) for side in window)
    rows = (y[:, None] - y + window[0] - 1)[:, None, :, None]
    columns = (x[:, None] - x + window[1] - 1)[None, :, None, :]
    return offsets, (rows * (2 * window[1] - 1) + columns).flatten(2).flatten(0, 1)


def shift_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """-100 between pixels of a rolled window that were not adjacent: `[windows, pixels, pixels]`."""
    with torch.inference_mode(False):
        label = torch.zeros(1, *size, 1, device=device)
        rows, columns = ((slice(-w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift))
        for i, y in enumerate(rows):
            for j, x in enumerate(columns):
                label[:, y, x] = 3 * i + j
        label = partition(label, window)[0, ..., 0]
        apart = label[:, None] - label[:, :, None]
        return apart.masked_fill(apart != 0, -100.0)


@lru_cache(maxsize=8)
def _stored_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    return shift_mask(size, window, shift, device)
