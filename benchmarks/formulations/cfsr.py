"""CFSR in planes: 1x1 convolutions, and a layer norm written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import planes
from visionattn.models.cfsr import CFSR, Block, ConvMod, EdgeConv, EdgeMlp, Layer


class TheirLayer(Layer):
    """All blocks in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = planes(x)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = x + block.layer_scale_1[:, None, None] * _modulate(block.attn, x)
            x = x + block.layer_scale_2[:, None, None] * _mlp(block.mlp, x)
        return (_pointwise(self.conv, x) + x).permute(0, 2, 3, 1)


def _modulate(self: ConvMod, x: Tensor) -> Tensor:
    x = _layer_norm(self.norm, x)
    a = self.dwconv(F.gelu(_pointwise(self.a, x)))
    return _pointwise(self.proj, a * _pointwise(self.v, x))


def _mlp(self: EdgeMlp, x: Tensor) -> Tensor:
    x = F.gelu(_pointwise(self.fc1, _layer_norm(self.norm, x)))
    if isinstance(self.pos, EdgeConv):
        local = F.conv2d(x, self.pos.weight, self.pos.bias, padding=1, groups=self.pos.groups)
        scales, biases = self.pos.edge_scale, self.pos.edge_bias
        for scale, bias, mask in zip(scales.unbind(1), biases.unbind(1), self.pos.masks):
            kernel = scale[:, None, None, None] * mask
            local += F.conv2d(x, kernel, bias, padding=1, groups=self.pos.groups)
    else:
        local = self.pos(x)
    return _pointwise(self.fc2, x + F.gelu(local))


def _pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Over the channels of planes."""
    x = x - x.mean(1, keepdim=True)
    x = x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + norm.eps)
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]


class _Merged(Formulation):
    def prepare(self, net: nn.Module) -> None:
        """For inference the authors merge the edge detectors when the network is made."""
        if isinstance(net, CFSR) and not net.training:
            net.fuse()


FORMULATION = _Merged(
    {Layer: TheirLayer},
    ((64, 64),),
    "planes, layer norm written out, in training four convolutions for the edges; inference merges them",
)
