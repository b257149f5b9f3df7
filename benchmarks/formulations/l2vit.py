"""L2ViT as published: convolutions in planes, windows cut and put together, linear attention by heads."""

from __future__ import annotations

from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import (
    ImagesInPlanes,
    TheirStridedConv,
    TheirWindowAttention,
    planes,
)
from benchmarks.formulations.planes import TheirMapSequential
from visionattn.layers import LinearAttention2d, WindowAttention2d
from visionattn.layers.maps import fill_up
from visionattn.models.frames.common import StridedConv2d
from visionattn.models.frames.pyramid import MapSequential
from visionattn.models.l2vit import L2Block, L2ViT, LocalConcentration


class TheirL2ViT(ImagesInPlanes, L2ViT):
    """Images stay in planes up to the stem."""


class TheirBlock(L2Block):
    """Position encodings in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = x + self.cpe[0](planes(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attend(x))
        if self.norm3 is None or self.local_mp is None:
            x = x + self.cpe[1](planes(x)).permute(0, 2, 3, 1)
        else:
            x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TheirConcentration(LocalConcentration):
    """Both convolutions in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = self.bn(self.act(self.conv1(planes(x))))
        return self.conv2(x).permute(0, 2, 3, 1)


class TheirFilledAttention(TheirWindowAttention):
    """Windows of a map that is filled up."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        out = super().forward(fill_up(x, (self.window_size, self.window_size)))
        return out[:, :height, :width].contiguous()


class TheirLinearAttention(LinearAttention2d):
    """Keys and values first, by heads."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = q.relu(), k.relu()
        denominator = (q @ k.transpose(-2, -1).sum(-1, keepdim=True)).clamp(min=self.floor)
        state = k.transpose(-2, -1) @ v * self.temperature
        return self.proj((q @ state / denominator).transpose(1, 2).flatten(2)).view_as(x)


FORMULATION = Formulation(
    {
        L2ViT: TheirL2ViT,
        MapSequential: TheirMapSequential,
        StridedConv2d: TheirStridedConv,
        L2Block: TheirBlock,
        LocalConcentration: TheirConcentration,
        WindowAttention2d: TheirFilledAttention,
        LinearAttention2d: TheirLinearAttention,
    },
    (),
    "convolutions in planes, windows cut and put together, matmul-softmax-matmul, keys and values by heads",
)
