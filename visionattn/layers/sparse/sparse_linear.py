"""Sparse attention where it matters and linear attention elsewhere.

Paper: "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
https://arxiv.org/abs/2509.24006.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import nearest
from visionattn.kernels import linear_attention, routed_attention, topk_regions
from visionattn.kernels.checks import pair
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.checks import num_regions
from visionattn.kernels.routed.lists import listed_regions
from visionattn.kernels.routed.regions import from_rows, to_rows
from visionattn.layers.linear import Linear

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}


class SparseLinearAttention2d(nn.Module):
    """Softmax attention to the regions of largest affinity, plus a projected linear attention.

    The linear attention passes through a linear layer `mix` that all heads share and that begins as zero: a
    network whose full attention this replaces starts from the sparse one alone, and fine-tuning lets the
    linear one make up for what is left out. `mix` is all that SLA adds to the parameters of attention.

    Example:
        >>> layer = SparseLinearAttention2d(64, 2, ratio=0.1)
        >>> layer(torch.randn(1, 64, 48, 64)).shape
        torch.Size([1, 64, 48, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads; each lists regions for itself.
        region_size: side of a region in pixels, or (height, width).
        ratio: the share of the regions that is listed, rounded down, but one at least.
        linear: what the linear attention runs over: `"rest"`, the regions that are not listed (zero where
            there is none); `"all"`, every pixel, as in the authors' later code.
        skip: of `"rest"`, the share of the regions of least affinity that is left out, rounded down.
        feature_map: what makes queries and keys of the linear attention: `"softmax"` over the channels of a
            head, `"elu"` (plus one), `"relu"`.
        qkv_bias: whether the projection to queries, keys and values has a bias.

    Raises:
        ValueError: a share out of its range, or an unknown `linear` or `feature_map`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        region_size: int | tuple[int, int] = 8,
        *,
        ratio: float = 0.05,
        linear: Literal["rest", "all"] = "rest",
        skip: float = 0.0,
        feature_map: str = "softmax",
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not 0 < ratio <= 1 or not 0 <= skip < 1:
            raise ValueError(f"ratio must be in (0, 1] and skip in [0, 1), got ratio={ratio}, skip={skip}")
        if linear not in ("rest", "all") or (skip and linear == "all"):
            raise ValueError(
                f"linear must be 'rest' or, without skip, 'all'; got {linear!r} with skip={skip}"
            )
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is unknown; {nearest(feature_map, FEATURE_MAPS)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.region_size = pair("region_size", region_size)
        self.ratio, self.skip, self.linear, self.feature_map = ratio, skip, linear, feature_map
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.mix = Linear(dim // num_heads, dim // num_heads, **dd)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        sparse, linear = self.branches(q, k, v)
        return self.proj((sparse + self.mix(linear)).flatten(3))

    def branches(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The sparse and the linear attention `[B, H, W, heads, d]` of maps of that shape."""
        regions = num_regions(q, self.region_size)
        listed, last = max(1, int(self.ratio * regions)), regions - int(self.skip * regions)
        order = topk_regions(q, k, self.region_size, regions, per_head=True)
        lists = order[..., :listed]
        sparse = routed_attention(q, k, v, lists, self.region_size, distinct=True, full=True)
        features = FEATURE_MAPS[self.feature_map]
        query, key = (features(at_least_float32(x)).to(x.dtype) for x in (q, k))
        if self.linear == "all":
            return sparse, linear_attention(query, key, v, scale=1.0, eps=1e-5)
        return sparse, self._rest(query, key, v, listed_regions(order[..., listed:last], regions))

    def _rest(self, q: Tensor, k: Tensor, v: Tensor, taken: Tensor) -> Tensor:
        """Linear attention of every region to those `taken` `[B, heads, regions, regions]`."""
        region, dtype = self.region_size, v.dtype
        with without_autocast(q):
            queries, keys, values = (at_least_float32(to_rows(x, region)) for x in (q, k, v))
            # The state of a region and, in its last column, the sum of its keys.
            values = F.pad(values, (0, 1), value=1.0)
            states = (keys.transpose(1, 2) @ values).flatten(1).unflatten(0, (-1, taken.shape[2]))
            states = (taken.flatten(0, 1).to(states.dtype) @ states).flatten(0, 1)
            out = queries @ states.unflatten(1, (-1, values.shape[2]))
            total = out[..., -1:]
            out = out[..., :-1] / total.masked_fill(total == 0, 1)
        return from_rows(out.to(dtype), q, region)
