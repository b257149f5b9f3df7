"""Swin, PVT, CSwin and DeiT as their authors write them: the networks around the published linear attentions.

The published code knows maps that windows divide only, and keeps maps as rows of pixels between layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.hat import gathered_bias, shift_mask
from benchmarks.formulations.windows import merge, partition
from visionattn.layers import WindowAttention2d
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import StridedConv2d
from visionattn.models.frames.pyramid import PatchEmbedding, PatchMerging, Pyramid
from visionattn.models.hosts.cswin import CSwin, StripeAttention
from visionattn.models.hosts.deit import SoftmaxAttention
from visionattn.models.hosts.pvt import PVT
from visionattn.models.hosts.swin import Swin

Size = tuple[int, int]


class ImagesInPlanes(Pyramid):
    """Images stay in planes."""

    def embed(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` to `[B, H / s, W / s, C]`."""
        return self.stem(x.permute(0, 2, 3, 1))


class TheirStridedConv(StridedConv2d):
    """A convolution in planes; its output stays so."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`."""
        return nn.Conv2d.forward(self, input.contiguous())


class TheirEmbedding(PatchEmbedding):
    """A convolution in planes, whose transposed output is normalised.

    PVT asks whether a map has as many pixels as that of the first stage, and resizes the embeddings of all
    other stages to the size that they have.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / stride, W / stride, dim]`."""
        x = on_nhwc(self.proj, x)
        size = (x.shape[1], x.shape[2])
        x = self.norm(x.flatten(1, 2))
        if self.pos_embed is None or self.size is None:
            return x.unflatten(1, size)
        place = self.pos_embed
        if self.stride != 4 or size != self.size:
            place = F.interpolate(
                place.unflatten(1, self.size).permute(0, 3, 1, 2), size=size, mode="bilinear"
            )
            place = place.flatten(2).transpose(1, 2)
        return (x + place).unflatten(1, size)


class TheirMerging(PatchMerging):
    """Four strided maps side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / 2, W / 2, dim]`."""
        x = torch.cat([x[:, i::2, j::2] for j in range(2) for i in range(2)], -1)
        return self.reduction(self.norm(x))


class TheirWindowAttention(WindowAttention2d):
    """The map is rolled and cut into windows, a mask keeps apart what was not adjacent before."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        batch, height, width, _ = x.shape
        window = self.window_size
        shift = self.shift if min(height, width) > window else 0
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        rows = partition(x, (window, window)).flatten(0, 1)
        q, k, v = self.qkv(rows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        if self.relative_position_bias_table is not None:
            logits = logits + gathered_bias(self.relative_position_bias_table, window, 0)
        if shift:
            mask = shift_mask(height, width, window, shift, x.device)
            logits = (logits.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
        out = self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        out = merge(out.unflatten(0, (batch, -1)), (window, window), height, width)
        return out.roll((shift, shift), (1, 2)) if shift else out


class TheirStripeAttention(StripeAttention):
    """To planes, to windows, to heads, and back; each a copy of every map."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        windows = [(height, width)]
        if self.stripe is not None:
            windows = [(height, self.stripe), (self.stripe, width)]
        qkv = self.qkv(x).unflatten(-1, (3, -1)).permute(3, 0, 1, 2, 4)
        branches = [
            _attend_in_windows(part, window, lepe, self.num_heads // len(windows))
            for part, window, lepe in zip(qkv.chunk(len(windows), -1), windows, self.lepe)
        ]
        return self.proj(torch.cat(branches, -1) if len(branches) > 1 else branches[0])


def _attend_in_windows(qkv: Tensor, window: Size, lepe: nn.Module, heads: int) -> Tensor:
    height, width, channels = qkv.shape[2:]
    pixels = window[0] * window[1]
    q, k = (
        windows_of_planes(planes(x), window).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
        for x in qkv[:2]
    )
    v = planes(qkv[2]).unflatten(3, (-1, window[1])).unflatten(2, (-1, window[0]))
    v = v.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, *window)
    v, local = (
        t.reshape(-1, heads, channels // heads, pixels).transpose(2, 3).contiguous() for t in (v, lepe(v))
    )
    out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v + local
    out = out.transpose(1, 2).flatten(2).unflatten(0, (qkv.shape[1], -1))
    return merge(out, window, height, width)


class TheirSoftmaxAttention(SoftmaxAttention):
    """Matmul-softmax-matmul."""

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens `[B, N, C]` to `[B, N, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def project(qkv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, N, C]` of tokens."""
    q, k, v = qkv(x).unflatten(-1, (3, -1)).permute(2, 0, 1, 3)
    return q, k, v


def project_apart(qkv: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by two layers, one for the queries."""
    dim = qkv.in_features
    sizes = [dim, 2 * dim]
    q, kv = (F.linear(x, *part) for part in zip(qkv.weight.split(sizes), qkv.bias.split(sizes)))
    k, v = kv.unflatten(-1, (2, dim)).permute(2, 0, 1, 3)
    return q, k, v


def one_window(
    q: Tensor, k: Tensor, v: Tensor, size: Size, conv: nn.Module
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CSwin's form of tokens that attend inside one window, and the convolution of the values."""
    q, k = (windows_of_planes(planes(t.unflatten(1, size)), size) for t in (q, k))
    maps = planes(v.unflatten(1, size))
    v, local = (t.flatten(2).transpose(1, 2).contiguous() for t in (maps, conv(maps)))
    return q, k, v, local


def add_to_map(x: Tensor, local: Tensor, prefix: int) -> Tensor:
    """Add features of pixels to tokens of which the first `prefix` belong to no pixel."""
    if not prefix:
        return x + local
    x[:, prefix:] = x[:, prefix:] + local
    return x


def planes(x: Tensor) -> Tensor:
    """`[B, C, H, W]` in memory of `[B, H, W, C]`."""
    return x.permute(0, 3, 1, 2).contiguous()


def windows_of_planes(x: Tensor, window: Size) -> Tensor:
    """Windows `[B * windows, pixels, C]` of `[B, C, H, W]`."""
    x = x.unflatten(3, (-1, window[1])).unflatten(2, (-1, window[0]))
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, window[0] * window[1], x.shape[1])


class TheirPVT(ImagesInPlanes, PVT):
    """Images stay in planes."""


class TheirSwin(ImagesInPlanes, Swin):
    """Images stay in planes."""


class TheirCSwin(ImagesInPlanes, CSwin):
    """Images stay in planes."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    PVT: TheirPVT,
    Swin: TheirSwin,
    CSwin: TheirCSwin,
    StridedConv2d: TheirStridedConv,
    PatchEmbedding: TheirEmbedding,
    PatchMerging: TheirMerging,
    SoftmaxAttention: TheirSoftmaxAttention,
    StripeAttention: TheirStripeAttention,
    WindowAttention2d: TheirWindowAttention,
}
