"""HSDT's 3-D convolutions, and bands mixed pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from visionattn.models import hsdt
from visionattn.models.hsdt import GuidedSpectralAttention, SelfModulatedMlp, SpectralSpatialConv, UpConv


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 3-D convolution of `[B, D, H, W, C]`."""
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, conv.stride, padding=1)
    return y.permute(0, 2, 3, 4, 1)


def spectral_spatial_conv(self: SpectralSpatialConv, x: Tensor) -> Tensor:
    """3-D convolutions of one band, and of one pixel."""
    x = x.permute(0, 4, 1, 2, 3)
    y = x
    for conv in (self.spatial1, self.spatial2):
        y = F.leaky_relu(F.conv3d(y, conv.weight[:, :, None], padding=(0, 1, 1)))
    return (y + F.conv3d(x, self.spectral.weight[..., None], padding=(1, 0, 0))).permute(0, 2, 3, 4, 1)


def up_conv(self: UpConv, x: Tensor, top: int = 0, height: int | None = None) -> Tensor:
    """Enlargement of the volume; `top` and `height` are for bands and not used."""
    volume = x.permute(0, 4, 1, 2, 3)
    volume = F.interpolate(volume, scale_factor=(1.0, 2.0, 2.0), mode="trilinear", align_corners=True)
    return convolve(self, volume.permute(0, 2, 3, 4, 1))


def spectral_attention(self: GuidedSpectralAttention, x: Tensor, weights: Tensor) -> Tensor:
    """At every pixel a product with its bands, between two projections."""
    mixed = weights[:, None, None] @ self.v(x.permute(0, 2, 3, 1, 4))
    return self.proj(mixed).permute(0, 3, 1, 2, 4) + x


def modulated_mlp(self: SelfModulatedMlp, x: Tensor) -> Tensor:
    """The gate in two operations."""
    value, gate = self.gated(x).chunk(2, -1)
    return self.fc2(F.gelu(self.fc1(x))) + value * torch.sigmoid(gate)


FORMULATION = Formulation(
    hsdt,
    {
        "_convolve": convolve,
        "SpectralSpatialConv.forward": spectral_spatial_conv,
        "UpConv.forward": up_conv,
        "GuidedSpectralAttention.forward": spectral_attention,
        "SelfModulatedMlp.forward": modulated_mlp,
    },
    ((64, 64),),
    "3-D convolutions and enlargement, a product with the mixing matrix at every pixel",
)
