"""InLine attention as published: the subtraction of two means at the end, the local kernels in planes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation, TheirBlock
from benchmarks.formulations.linear_hosts import (
    CLASSES,
    Size,
    add_to_map,
    one_window,
    project,
    project_apart,
)
from visionattn.layers import InLineAttention2d
from visionattn.layers.maps import as_tokens
from visionattn.models.hosts.cswin import CSwin
from visionattn.models.hosts.pvt import PVT
from visionattn.models.inline_attention import StreamBlock


class TheirInLineAttention(InLineAttention2d):
    """The published layer in Swin and DeiT."""

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """A map `[B, H, W, C]`, or tokens `[B, N, C]` of a map of `size`, to the same."""
        tokens, size, prefix = as_tokens(x, size)
        return _attend(self, *project(self.qkv, tokens), tokens.mean(1), size, prefix).view_as(x)


class TheirPvtAttention(InLineAttention2d):
    """In PVT, queries come apart from keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        tokens, size, _ = as_tokens(x, None)
        return _attend(self, *project_apart(self.qkv, tokens), tokens.mean(1), size).view_as(x)


class TheirCSwinAttention(InLineAttention2d):
    """In CSwin, maps go to planes, to one window, and back; the values are convolved twice."""

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """A map `[B, H, W, C]` and its mean `[B, C]` before the norm to a map."""
        tokens, size, _ = as_tokens(x, None)
        assert self.dwc is not None
        q, k, v, static = one_window(*project(self.qkv, tokens), size, self.dwc)
        return _attend(self, q, k, v, mean, size, static=static).view_as(x)


def _attend(
    self: InLineAttention2d,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    size: Size,
    prefix: int = 0,
    static: Tensor | None = None,
) -> Tensor:
    """Tokens `[B, N, C]`, the mean `[B, C]` that kernels are predicted from, a convolution of the values."""
    batch, count, channels = q.shape
    q, k, v = (t.reshape(batch, count, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    kernels = self.residual(mean[..., None]).reshape(batch * channels, 1, 3, 3)

    scale = q.shape[-1] ** -0.5
    root = (scale / count) ** 0.5
    state = (k.transpose(-2, -1) * root) @ (v * root)
    rest = 1 - q @ k.mean(2, keepdim=True).transpose(-2, -1) * scale
    out = q @ state + rest * v.mean(2, keepdim=True)

    out = out.transpose(1, 2).reshape(batch, count, channels)
    maps = v[:, :, prefix:].transpose(1, 2).reshape(batch, *size, channels).permute(0, 3, 1, 2)
    maps = maps.reshape(1, batch * channels, *size)
    local = F.conv2d(maps, kernels, padding=1, groups=batch * channels)
    out = add_to_map(out, local.reshape(batch, channels, -1).transpose(1, 2), prefix)
    return self.proj(out if static is None else out + static)


class TheirStreamBlock(TheirBlock, StreamBlock):
    """The MLP on the whole map."""


FORMULATION = Formulation(
    {**CLASSES, InLineAttention2d: TheirInLineAttention},
    (),
    "means subtracted at the end, kernels predicted by grouped convolutions and applied in planes; hosts in "
    "planes, rolled windows, stripes copied three times",
    hosts={
        CSwin: {InLineAttention2d: TheirCSwinAttention, StreamBlock: TheirStreamBlock},
        PVT: {InLineAttention2d: TheirPvtAttention},
    },
)
