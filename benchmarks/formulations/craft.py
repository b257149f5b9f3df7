"""CRAFT's rectangle windows, and its attention among channels with a layer norm written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.rectangles import TheirRectangleAttention
from visionattn.layers.windows.rectangle_window import RectangleWindowAttention
from visionattn.models.craft import ChannelAttention, FusionBlock, HighFrequencyBlock


class TheirHighFrequencyBlock(HighFrequencyBlock):
    """Two branches on halves of the channels, joined."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = x.permute(0, 3, 1, 2)
        half = x.shape[1] // 2
        local, peaks = F.gelu(self.conv(x[:, :half])), F.gelu(_pointwise(self.fc, self.pool(x[:, half:])))
        return (x + _pointwise(self.last_fc, torch.cat((local, peaks), 1))).permute(0, 2, 3, 1)


class TheirFusionBlock(FusionBlock):
    """Restormer's attention among channels and its MLP."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Maps `[B, H, W, C]` of low and high frequencies to one."""
        low, high = low.permute(0, 3, 1, 2), high.permute(0, 3, 1, 2)
        x = low + _channel_attention(self.attn, _layer_norm(self.norm1, low), high)
        gate, value = self.mlp.dwconv(_pointwise(self.mlp.fc1, _layer_norm(self.norm2, x))).chunk(2, 1)
        return (x + _pointwise(self.mlp.fc2, F.gelu(gate) * value)).permute(0, 2, 3, 1)


def _channel_attention(self: ChannelAttention, low: Tensor, high: Tensor) -> Tensor:
    size = low.shape[2:]
    q = self.q_dwconv(_pointwise(self.q, high))
    k, v = self.kv_dwconv(_pointwise(self.kv, low)).chunk(2, 1)
    q, k, v = (t.unflatten(1, (self.num_heads, -1)).flatten(3) for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out = (q @ k.transpose(2, 3) * self.temperature).softmax(-1) @ v
    return _pointwise(self.proj, out.flatten(1, 2).unflatten(2, size))


def _pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer as the 1x1 convolution that it is there."""
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Over the channels of planes, as rows of pixels."""
    size = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    x = (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
    return x.transpose(1, 2).unflatten(2, size)


FORMULATION = Formulation(
    {
        RectangleWindowAttention: TheirRectangleAttention,
        HighFrequencyBlock: TheirHighFrequencyBlock,
        FusionBlock: TheirFusionBlock,
    },
    ((64, 64),),
    "roll, planes to windows to heads, bias by MLP and gather, matmul-softmax-matmul, layer norm written out",
)
