"""CARE as published: every layer a convolution in planes, linear attention by heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import ImagesInPlanes, planes
from benchmarks.formulations.planes import TheirMapSequential
from visionattn.models.care import CARE, CAREBlock, Interaction, TokenMixer
from visionattn.models.frames.pyramid import MapSequential


class TheirCARE(ImagesInPlanes, CARE):
    """Images stay in planes."""


class TheirTokenMixer(TokenMixer):
    """Planes in and out; keys and values first."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        far, near, around = planes(x).chunk(3, 1)
        mixed = self._attend_in_planes(far) if self.head_dim else self._along_strips_in_planes(far)
        return torch.cat([mixed, self.dwconv1(near), self.dwconv2(around)], 1).permute(0, 2, 3, 1)

    def _along_strips_in_planes(self, x: Tensor) -> Tensor:
        return self.dwconvatt_1(x) + self.dwconvatt_2(x)

    def _attend_in_planes(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pixels, heads = height * width, channels // self.head_dim
        qk = conv1x1(self.qk, x)
        q, k = (
            (F.elu(part) + 1).reshape(batch, heads, -1, pixels).transpose(2, 3) for part in qk.chunk(2, 1)
        )
        v = x.reshape(batch, heads, -1, pixels).transpose(2, 3)
        z = 1 / (q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
        kv = (k.transpose(-2, -1) * pixels**-0.5) @ (v * pixels**-0.5)
        return (q @ kv * z).transpose(2, 3).reshape(x.shape)


class TheirInteraction(Interaction):
    """Layer by layer, in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = planes(x)
        y = self.conv(self.act(conv1x1(self.fc1, self.norm(x))))
        y = y if self.fc2 is None else conv1x1(self.fc2, y) + x
        return y.permute(0, 2, 3, 1)


class TheirCAREBlock(CAREBlock):
    """Quarters cut and joined in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = planes(x)
        memory, mixed = x.split([self.dim, 3 * self.dim], 1)
        mixed = planes(self.inter1(self.token_mixer(mixed.permute(0, 2, 3, 1))))
        y = planes(self.inter2(torch.cat([memory, mixed], 1).permute(0, 2, 3, 1)))
        y = y if self.gamma is None else x + self.drop_path(self.gamma[:, None, None] * y)
        return y.permute(0, 2, 3, 1)


def conv1x1(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer of pixels as a convolution in planes."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


FORMULATION = Formulation(
    {
        CARE: TheirCARE,
        MapSequential: TheirMapSequential,
        TokenMixer: TheirTokenMixer,
        Interaction: TheirInteraction,
        CAREBlock: TheirCAREBlock,
    },
    ((224, 224), (448, 448)),
    "every layer a convolution in planes, keys and values first, by heads",
)
