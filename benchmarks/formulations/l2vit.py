"""L2ViT as published: convolutions in planes, windows cut and put together, linear attention by heads."""

from __future__ import annotations

from torch import Tensor

import visionattn
from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import convolve_planes, embed_image
from benchmarks.formulations.linear_hosts import window_attention as divided_attention
from visionattn.layers import LinearAttention2d, WindowAttention2d
from visionattn.layers.maps import fill_up
from visionattn.models.l2vit import Downsample, L2Block, LocalConcentration, Stem


def stem(self: Stem, x: Tensor) -> Tensor:
    """Convolutions in planes; their transposed output is normalised."""
    return self.norm(convolve_planes(self.proj, fill_up(x, (4, 4))).permute(0, 2, 3, 1))


def downsample(self: Downsample, x: Tensor) -> Tensor:
    """A norm of rows, a convolution in planes."""
    return convolve_planes(self.proj, fill_up(self.norm(x), (2, 2))).permute(0, 2, 3, 1)


def block(self: L2Block, x: Tensor) -> Tensor:
    """Position encodings in planes."""
    x = x + convolve_planes(self.cpe[0], x).permute(0, 2, 3, 1)
    x = x + self.drop_path(self.attend(x))
    if self.norm3 is None or self.local_mp is None:
        x = x + convolve_planes(self.cpe[1], x).permute(0, 2, 3, 1)
    else:
        x = x + self.drop_path(self.local_mp(self.norm3(x)))
    return x + self.drop_path(self.mlp(self.norm2(x)))


def local_concentration(self: LocalConcentration, x: Tensor) -> Tensor:
    """Both convolutions in planes."""
    x = self.bn(self.act(convolve_planes(self.conv1, x)))
    return self.conv2(x).permute(0, 2, 3, 1)


def window_attention(self: WindowAttention2d, x: Tensor) -> Tensor:
    """Windows of a map that is filled up."""
    height, width = x.shape[1:3]
    out = divided_attention(self, fill_up(x, (self.window_size, self.window_size)))
    return out[:, :height, :width].contiguous()


def linear_attention(self: LinearAttention2d, x: Tensor) -> Tensor:
    """Keys and values first, by heads."""
    qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = q.relu(), k.relu()
    denominator = (q @ k.transpose(-2, -1).sum(-1, keepdim=True)).clamp(min=self.floor)
    state = k.transpose(-2, -1) @ v * self.temperature
    return self.proj((q @ state / denominator).transpose(1, 2).flatten(2)).view_as(x)


FORMULATION = Formulation(
    visionattn,
    {
        "models.frames.pyramid.Pyramid._stem": embed_image,
        "models.l2vit.Stem.forward": stem,
        "models.l2vit.Downsample.forward": downsample,
        "models.l2vit.L2Block.forward": block,
        "models.l2vit.LocalConcentration.forward": local_concentration,
        "layers.WindowAttention2d.forward": window_attention,
        "layers.LinearAttention2d.forward": linear_attention,
    },
    (),
    "convolutions in planes, windows cut and put together, matmul-softmax-matmul, keys and values by heads",
)
