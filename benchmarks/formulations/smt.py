"""SMT as published: attention in products, the mixture of scales interleaved and convolved in groups."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import ImagesInPlanes, TheirEmbedding, TheirStridedConv
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import StridedConv2d
from visionattn.models.frames.pyramid import PatchEmbedding
from visionattn.models.smt import SMT, Attention, ConvMlp, Modulation


class TheirSMT(ImagesInPlanes, SMT):
    """Images stay in planes."""


class TheirConvMlp(ConvMlp):
    """Layer by layer."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = self.fc1(x)
        return self.fc2(self.act(x + on_nhwc(self.dwconv, x)))


class TheirModulation(Modulation):
    """Heads join the others one after the other; a grouped convolution, its norm, another convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        batch, height, width, channels = x.shape
        v = self.v(x)
        heads = self.s(x).unflatten(-1, (len(self.local_convs), -1)).permute(3, 0, 4, 1, 2)
        joined: Tensor | None = None
        for conv, head in zip(self.local_convs, heads):
            head = conv(head).reshape(batch, -1, 1, height, width)
            joined = head if joined is None else torch.cat([joined, head], 2)
        assert joined is not None
        x = self.act(self.bn(self.proj0(joined.reshape(batch, channels, height, width))))
        modulator = self.proj1(x).reshape(batch, channels, -1).transpose(1, 2)
        return self.proj(modulator * v.flatten(1, 2)).unflatten(1, (height, width))


class TheirAttention(Attention):
    """Matmul-softmax-matmul, and the values put together again for their convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        tokens = x.flatten(1, 2)
        q = self.q(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        values = v.transpose(1, 2).reshape(x.shape)
        local = on_nhwc(self.local_conv, values).flatten(1, 2)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return self.proj(out + local).view_as(x)


FORMULATION = Formulation(
    {
        SMT: TheirSMT,
        StridedConv2d: TheirStridedConv,
        PatchEmbedding: TheirEmbedding,
        ConvMlp: TheirConvMlp,
        Modulation: TheirModulation,
        Attention: TheirAttention,
    },
    ((224, 224), (448, 448)),
    "scales interleaved one by one, grouped convolution, norm, 1x1 convolution; matmul-softmax-matmul",
)
