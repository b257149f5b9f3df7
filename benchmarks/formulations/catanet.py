"""CATANet's sorted groups and its patches, cut out and put back one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from visionattn.layers.overlapping_patches import ConvMlp, HeadProjection, LocalAttention
from visionattn.models.catanet import TokenAggregation


class TheirAggregation(TokenAggregation):
    """Projections of all pixels, then one gather each; groups unfolded with the ones behind them."""

    def forward(self, x: Tensor, centres: Tensor, initialised: Tensor) -> tuple[Tensor, Tensor]:
        """A map `[B, H, W, C]` and centres to a map and the centres of training."""
        tokens = self.norm(x.flatten(1, 2))
        if self.training:
            means = self.segment_means(tokens.detach())
            centres = torch.where(initialised, centres, means)
            with torch.no_grad():
                for _ in range(self.iterations - 1):
                    centres = _move(F.normalize(tokens, dim=-1), F.normalize(centres, dim=-1))
            centres = _move(F.normalize(tokens, dim=-1), F.normalize(centres, dim=-1))
        with torch.no_grad():
            nearest = _cosines(F.normalize(tokens, dim=-1), F.normalize(centres, dim=-1)).argmax(-1)
            order = nearest.argsort(dim=-1, stable=True)[..., None]
        out = _attend(self, tokens, order, centres)
        planes = out.unflatten(1, x.shape[1:3]).permute(0, 3, 1, 2).contiguous()
        planes = F.conv2d(planes, self.out.weight[..., None, None])
        x = x + planes.permute(0, 2, 3, 1)
        return x + self.mlp(x), centres.detach()


def _cosines(tokens: Tensor, centres: Tensor) -> Tensor:
    return torch.einsum("bnc,mc->bnm", tokens, centres)


def _move(tokens: Tensor, centres: Tensor) -> Tensor:
    """Centres moved to their tokens, which are added one by one."""
    nearest = _cosines(tokens, centres).argmax(-1)
    ones = torch.ones_like(nearest)
    members = nearest.new_zeros(len(tokens), len(centres)).scatter_add_(1, nearest, ones).sum(0)
    where = nearest[..., None].expand_as(tokens)
    sums = tokens.new_zeros(len(tokens), *centres.shape).scatter_add(1, where, tokens)
    return torch.where(members[:, None] == 0, centres, F.normalize(sums.sum(0), dim=-1))


def _attend(self: TokenAggregation, tokens: Tensor, order: Tensor, centres: Tensor) -> Tensor:
    count, heads = tokens.shape[1], self.qkv.num_heads
    q, k, v = (t.gather(1, order.expand_as(t)) for t in _project(self.qkv, tokens))
    size = min(count, self.group_size)
    groups = -(-count // size)
    missing = groups * size - count
    q = torch.cat((q, q[:, count - missing :].flip(1)), 1)
    q = q.unflatten(1, (groups, size)).unflatten(-1, (heads, -1)).transpose(2, 3)
    k, v = (
        torch.cat((t, t[:, count - missing - size :].flip(1)), 1)
        .unfold(1, 2 * size, size)
        .unflatten(2, (heads, -1))
        .transpose(3, 4)
        for t in (k, v)
    )
    of_centres = (
        layer(centres.to(tokens.dtype)).unflatten(-1, (heads, -1)).transpose(0, 1)
        for layer in (self.centre_kv.k, self.centre_kv.v)
    )
    k_centres, v_centres = (t.expand(len(tokens), groups, -1, -1, -1) for t in of_centres)
    out = F.scaled_dot_product_attention(q, k, v)
    out = out + F.scaled_dot_product_attention(q, k_centres, v_centres)
    out = out.transpose(2, 3).reshape(len(tokens), groups * size, -1)[:, :count]
    return self.proj(out.scatter(1, order.expand_as(out), out))


def _project(self: HeadProjection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three products, heads in their own width."""
    assert self.q is not None
    return self.q(x), self.k(x), self.v(x)


class TheirLocalAttention(LocalAttention):
    """Patches in a stack, all rows of each attending to all; sums by slices."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        image, side, step = x.permute(0, 3, 1, 2), self.patch_size, self.patch_size - 2
        height, width = image.shape[2:]
        places = [(top, left) for top in _starts(height, side) for left in _starts(width, side)]
        patches = torch.stack([image[:, :, i : i + side, j : j + side] for i, j in places])
        patches = patches.transpose(0, 1).contiguous().flatten(0, 1).flatten(2).transpose(1, 2)
        q, k, v = (
            t.unflatten(-1, (self.qkv.num_heads, -1)).transpose(1, 2)
            for t in _project(self.qkv, self.norm(patches))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        patches = (
            (self.proj(out) + patches).unflatten(0, (len(x), -1)).transpose(2, 3).unflatten(3, (side, side))
        )
        total = torch.zeros_like(image)
        for index, (i, j) in enumerate(places):
            total[:, :, i : i + side, j : j + side] += patches[:, index]
        for begin in range(step, height + step - side, step):
            total[:, :, min(begin, height - side) : begin + 2] /= 2
        for begin in range(step, width + step - side, step):
            total[..., min(begin, width - side) : begin + 2] /= 2
        x = total.permute(0, 2, 3, 1)
        return self.mlp(x) + x


def _starts(side: int, patch: int) -> Iterator[int]:
    return (min(begin, side - patch) for begin in range(0, side - 2, patch - 2))


class TheirConvMlp(ConvMlp):
    """Rows of pixels, to planes for the convolution, and back."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        size = x.shape[1:3]
        x = F.gelu(self.fc1(self.norm(x.flatten(1, 2))))
        local = F.gelu(self.dwconv(x.transpose(1, 2).unflatten(2, size).contiguous()))
        return self.fc2(x + local.flatten(2).transpose(1, 2).contiguous()).unflatten(1, size)


FORMULATION = Formulation(
    {TokenAggregation: TheirAggregation, LocalAttention: TheirLocalAttention, ConvMlp: TheirConvMlp},
    ((64, 64),),
    "gather, unfold and scatter of sorted pixels, patches in a stack, attention on heads of 9 and 10",
)
