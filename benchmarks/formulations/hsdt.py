"""HSDT's 3-D convolutions, and bands mixed pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from visionattn.layers.volumes import SpectralSpatialConv, UpConv, VolumeConv
from visionattn.models.hsdt import GuidedSpectralAttention, SelfModulatedMlp


class TheirVolumeConv(VolumeConv):
    """A 3-D convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, D, H, W]` to `[B, C', D, H', W']`."""
        return nn.Conv3d.forward(self, input)


class TheirSpectralSpatialConv(SpectralSpatialConv):
    """3-D convolutions of one band, and of one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, H, W, C]` to the same."""
        x = x.permute(0, 4, 1, 2, 3)
        y = x
        for conv in (self.spatial1, self.spatial2):
            y = F.leaky_relu(F.conv3d(y, conv.weight[:, :, None], padding=(0, 1, 1)))
        return (y + F.conv3d(x, self.spectral.weight[..., None], padding=(1, 0, 0))).permute(0, 2, 3, 4, 1)


class TheirUpConv(UpConv):
    """Enlargement of the volume, then a convolution of it."""

    def forward(self, input: Tensor, *band: object) -> Tensor:
        """`[B, D, H, W, C]` to `[B, D, 2 * H, 2 * W, C / 2]`; the place of a band is not used."""
        volume = input.permute(0, 4, 1, 2, 3)
        volume = F.interpolate(volume, scale_factor=(1.0, 2.0, 2.0), mode="trilinear", align_corners=True)
        return self.conv(volume).permute(0, 2, 3, 4, 1)


class TheirSpectralAttention(GuidedSpectralAttention):
    """At every pixel a product with its bands, between two projections."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """`[B, D, H, W, C]` and mixing weights `[B, D, D]` to `[B, D, H, W, C]`."""
        mixed = weights[:, None, None] @ self.v(x.permute(0, 2, 3, 1, 4))
        return self.proj(mixed).permute(0, 3, 1, 2, 4) + x


class TheirModulatedMlp(SelfModulatedMlp):
    """The gate in two operations."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, H, W, C]` to the same."""
        value, gate = self.gated(x).chunk(2, -1)
        return self.fc2(F.gelu(self.fc1(x))) + value * torch.sigmoid(gate)


FORMULATION = Formulation(
    {
        VolumeConv: TheirVolumeConv,
        SpectralSpatialConv: TheirSpectralSpatialConv,
        UpConv: TheirUpConv,
        GuidedSpectralAttention: TheirSpectralAttention,
        SelfModulatedMlp: TheirModulatedMlp,
    },
    ((64, 64),),
    "3-D convolutions and enlargement, a product with the mixing matrix at every pixel",
)
