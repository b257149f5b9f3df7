"""Three views of a map under learned gates: all of it compressed, its best regions, and the surroundings.

Paper: "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
https://arxiv.org/abs/2502.11089.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import dense_attention, neighborhood_attention, routed_attention
from visionattn.kernels.checks import pair
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.reference import places
from visionattn.kernels.routed.selectors.pick import pick_topk
from visionattn.layers.linear import Linear
from visionattn.layers.maps import fill_up, on_nhwc


class NativeSparseAttention2d(nn.Module):
    """Compressed, selected and local attention, summed with a gate per pixel, head and branch.

    Keys and values of a region are compressed to one each by learned weights per place. Every pixel attends
    to all compressed ones; those weights, summed over the heads that share keys, choose `topk` regions whose
    pixels it then attends to; and it attends to its neighborhood. Each branch has keys and values of its own.
    The paper is about sequences and also forces the first block and the block before the query's; on a map
    the first and the own region are forced, for the neighborhood covers what lies next to the query.

    The weights of the compressed branch are written out to choose from: memory grows with pixels times
    regions.

    Example:
        >>> layer = NativeSparseAttention2d(64, 4, num_kv_heads=2, topk=4)
        >>> layer(torch.randn(1, 30, 40, 64)).shape
        torch.Size([1, 30, 40, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: heads of the queries.
        num_kv_heads: heads of the keys and values, which num_heads is a multiple of; num_heads by default.
        region_size: side of a region in pixels, or (height, width).
        topk: regions that a pixel attends to, the first and its own included; all there are, if fewer.
        kernel_size: side of the neighborhood, or (height, width); the map's, where that is smaller.
        qkv_bias: whether the projections to queries, keys and values have biases.

    Raises:
        ValueError: dim or heads that do not divide, or a size or topk below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        region_size: int | tuple[int, int] = 8,
        topk: int = 16,
        kernel_size: int | tuple[int, int] = 15,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of num_heads={num_heads}, and that a multiple of "
                f"num_kv_heads={num_kv_heads}"
            )
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.num_kv_heads, self.topk = num_heads, num_kv_heads, topk
        self.region_size, self.kernel_size = (
            pair("region_size", region_size),
            pair("kernel_size", kernel_size),
        )
        width = dim // num_heads * num_kv_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 6 * width, bias=qkv_bias, **dd)
        self.gates = Linear(dim, 3 * num_heads, **dd)
        self.compress_k, self.compress_v = (_means(width, self.region_size, **dd) for _ in range(2))
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        kv = self.kv(x).unflatten(-1, (3, 2, self.num_kv_heads, -1))
        (k_all, v_all), (k_best, v_best), (k_near, v_near) = (maps.unbind(3) for maps in kv.unbind(3))
        k_all, v_all = self._compressed(self.compress_k, k_all), self._compressed(self.compress_v, v_all)
        kernel = min(self.kernel_size[0], x.shape[1]), min(self.kernel_size[1], x.shape[2])
        options: dict[str, Any] = {"query_region_size": 1, "distinct": True, "full": True}
        branches = (
            dense_attention(q, k_all, v_all),
            routed_attention(q, k_best, v_best, self._lists(q, k_all), self.region_size, **options),
            neighborhood_attention(q, k_near, v_near, kernel),
        )
        gates = self.gates(x).sigmoid().unflatten(-1, (3, self.num_heads, 1)).unbind(3)
        out = torch.stack([gate * branch for gate, branch in zip(gates, branches)]).sum(0)
        return self.proj(out.flatten(3))

    def _compressed(self, weigh: nn.Conv2d, x: Tensor) -> Tensor:
        """One vector per region `[B, rows, columns, heads, d]`; what a border region has counts for a whole
        one."""
        (height, width), (rows, columns) = x.shape[1:3], self.region_size
        out = on_nhwc(weigh, fill_up(x.flatten(3), self.region_size)).unflatten(-1, x.shape[3:])
        bottom, right = -height % rows, -width % columns
        if bottom:
            out = torch.cat([out[:, :-1], out[:, -1:] * (rows / (rows - bottom))], 1)
        if right:
            out = torch.cat([out[:, :, :-1], out[:, :, -1:] * (columns / (columns - right))], 2)
        return out

    @torch.no_grad()
    def _lists(self, q: Tensor, keys: Tensor) -> Tensor:
        """The regions of each pixel by the weights of its compressed attention `[B, kv heads, H * W, n]`."""
        with without_autocast(q):
            query, key = (at_least_float32(x).flatten(1, 2).transpose(1, 2) for x in (q, keys))
            query = query.unflatten(1, (self.num_kv_heads, -1))
            logits = query @ key[:, :, None].transpose(3, 4) * q.shape[-1] ** -0.5
            weights = logits.softmax(-1).sum(2)
        own, _ = places(q.shape[1:3], self.region_size, q.device)
        regions = torch.arange(weights.shape[3], device=q.device)
        forced = (regions == own[:, None]) | (regions == 0)
        return pick_topk(weights.masked_fill(forced, math.inf), self.topk)


def _means(width: int, region: tuple[int, int], **dd: Any) -> nn.Conv2d:
    """The weights of every place of a region, per channel; they begin as those of a mean."""
    conv = nn.Conv2d(width, width, region, stride=region, groups=width, bias=False, **dd)
    nn.init.constant_(conv.weight, 1 / (region[0] * region[1]))
    return conv
