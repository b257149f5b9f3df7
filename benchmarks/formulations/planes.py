"""Parts that several published networks write in planes, `[B, C, H, W]` in memory."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.formulations.linear_hosts import planes
from visionattn.models.frames.pyramid import MapSequential


class TheirMapSequential(MapSequential):
    """Convolutions in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H', W', C']`."""
        return nn.Sequential.forward(self, planes(x)).permute(0, 2, 3, 1)
