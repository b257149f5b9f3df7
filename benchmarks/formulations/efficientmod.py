"""EfficientMod as published: contexts convolved in planes and repeated for every group of hidden channels."""

from __future__ import annotations

from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import ImagesInPlanes, TheirEmbedding, TheirStridedConv, planes
from visionattn.models.efficientmod import EfficientMod, ModulationMlp
from visionattn.models.frames.common import StridedConv2d
from visionattn.models.frames.pyramid import PatchEmbedding


class TheirEfficientMod(ImagesInPlanes, EfficientMod):
    """Images stay in planes."""


class TheirModulationMlp(ModulationMlp):
    """The context there and back, and as many copies of it as the ratio says."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        context = self.context_act(self.context_conv(planes(self.context_in(x))))
        context = self.context_out(context.permute(0, 2, 3, 1).contiguous())
        x = self.fc1(x)
        if self.ratio > 1:
            x, context = self.act(x), context.repeat(1, 1, 1, self.ratio)
        return self.fc2(x * context)


FORMULATION = Formulation(
    {
        EfficientMod: TheirEfficientMod,
        StridedConv2d: TheirStridedConv,
        PatchEmbedding: TheirEmbedding,
        ModulationMlp: TheirModulationMlp,
    },
    ((224, 224), (448, 448)),
    "contexts convolved in planes and repeated along the channels; PyTorch's attention",
    fused_attention=True,
)
