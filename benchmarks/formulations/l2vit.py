"""L2ViT as published: convolutions in planes, windows cut and put together, linear attention by heads."""

from __future__ import annotations

from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import ImagesInPlanes, TheirWindowAttention, convolve_planes
from visionattn.layers import LinearAttention2d, WindowAttention2d
from visionattn.layers.maps import fill_up
from visionattn.models.l2vit import Downsample, L2Block, L2ViT, LocalConcentration, Stem


class TheirL2ViT(ImagesInPlanes, L2ViT):
    """Images stay in planes up to the stem."""


class TheirStem(Stem):
    """Convolutions in planes; their transposed output is normalised."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_chans]` to `[B, H / 4, W / 4, C]`."""
        return self.norm(convolve_planes(self.proj, fill_up(x, (4, 4))).permute(0, 2, 3, 1))


class TheirDownsample(Downsample):
    """A norm of rows, a convolution in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, 2 * C]`."""
        return convolve_planes(self.proj, fill_up(self.norm(x), (2, 2))).permute(0, 2, 3, 1)


class TheirBlock(L2Block):
    """Position encodings in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = x + convolve_planes(self.cpe[0], x).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attend(x))
        if self.norm3 is None or self.local_mp is None:
            x = x + convolve_planes(self.cpe[1], x).permute(0, 2, 3, 1)
        else:
            x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TheirConcentration(LocalConcentration):
    """Both convolutions in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = self.bn(self.act(convolve_planes(self.conv1, x)))
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
        Stem: TheirStem,
        Downsample: TheirDownsample,
        L2Block: TheirBlock,
        LocalConcentration: TheirConcentration,
        WindowAttention2d: TheirFilledAttention,
        LinearAttention2d: TheirLinearAttention,
    },
    (),
    "convolutions in planes, windows cut and put together, matmul-softmax-matmul, keys and values by heads",
)
