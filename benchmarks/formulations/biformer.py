"""BiFormer's bi-level routing attention with its gather of the listed regions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.windows import merge, partition
from visionattn.layers.bilevel_routing import BiLevelRoutingAttention
from visionattn.layers.maps import extend_to, fill_up, on_nhwc
from visionattn.models.biformer import FullAttention


class TheirRoutingAttention(BiLevelRoutingAttention):
    """Either official operator, with the parameters of our layer."""

    lepe: nn.Conv2d
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        region = self.region_size_of(*x.shape[1:3])
        return (_by_regions if self.pad == "input" else _by_maps)(self, x, region)


def _by_regions(self: TheirRoutingAttention, x: Tensor, region: tuple[int, int]) -> Tensor:
    """The map is cut into regions before the projection; keys and values are gathered together."""
    height, width, dim = x.shape[1:]
    sides = self.n_win * region[0], self.n_win * region[1]
    qkv = self.qkv(partition(extend_to(x, *sides), region))
    q, kv = qkv.split((dim, 2 * dim), -1)
    query, key = (t.detach().unflatten(2, region).mean((2, 3)) for t in (q, kv[..., :dim]))
    affinity = query * self.scale @ key.transpose(1, 2)
    indices = affinity.topk(min(self.topk, affinity.shape[-1])).indices
    local = self.lepe(merge(kv[..., dim:], region, *sides).permute(0, 3, 1, 2).contiguous())
    k, v = _gather(kv, indices).split((dim, dim), -1)
    out = merge(_attend(q, k, v, self.num_heads, self.scale), region, *sides)
    return self.proj(out + local.permute(0, 2, 3, 1))[:, :height, :width].contiguous()


def _by_maps(self: TheirRoutingAttention, x: Tensor, region: tuple[int, int]) -> Tensor:
    """The map stays whole for the pooling of regions and for the convolution; keys are gathered by head."""
    q, k, v = self.qkv(x).chunk(3, -1)
    query, key = (
        F.avg_pool2d(t.detach().permute(0, 3, 1, 2), region, ceil_mode=True, count_include_pad=False)
        for t in (q, k)
    )
    affinity = query.flatten(2).transpose(1, 2) @ key.flatten(2)
    indices = affinity.topk(min(self.topk, affinity.shape[-1])).indices
    local = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    q, k, v = (fill_up(t, region).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
    out = gathered_attention(q, k, v, indices[:, None], region, scale=self.scale).flatten(3)
    return self.proj(out[:, : x.shape[1], : x.shape[2]] + local)


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region_size: tuple[int, int],
    *,
    scale: float,
) -> Tensor:
    """Maps `[B, H, W, heads, d]`: keys and values of the listed regions are gathered, copied by heads."""
    height, width, heads, _ = q.shape[1:]
    q, k, v = (partition(x.flatten(3), region_size) for x in (q, k, v))
    lists = indices[:, 0].long()
    out = _attend(q, _gather(k, lists), _gather(v, lists), heads, scale)
    return merge(out, region_size, height, width).unflatten(-1, (heads, -1))


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    """`[B, regions, topk * pixels, C]` of `[B, regions, pixels, C]` and lists `[B, regions, topk]`."""
    where = indices[..., None, None].expand(-1, -1, -1, *x.shape[2:])
    return x[:, None].expand(-1, x.shape[1], -1, -1, -1).gather(2, where).flatten(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """`[B, regions, pixels, C]` of queries in this form and keys `[B, regions, topk * pixels, C]`."""
    batch = q.shape[0]
    q, k, v = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = (q * scale @ k.transpose(2, 3).contiguous()).softmax(-1) @ v.contiguous()
    return out.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))


class TheirFullAttention(FullAttention):
    """Attention of the last stage in products."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        local = on_nhwc(self.lepe, qkv.chunk(3, -1)[2] if self.lepe_of_values else x)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape) + local)


FORMULATION = Formulation(
    {BiLevelRoutingAttention: TheirRoutingAttention, FullAttention: TheirFullAttention},
    ((224, 224), (448, 448)),
    "gather of keys and values, copies by head, matmul-softmax-matmul",
)
