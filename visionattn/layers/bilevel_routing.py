"""Bi-level routing attention as a layer for any network on `[B, H, W, C]` maps.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
https://arxiv.org/abs/2303.08810.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionattn.kernels import routed_attention, topk_regions
from visionattn.layers.linear import Linear
from visionattn.layers.maps import extend_to, fill_up, on_nhwc


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention: every region attends to the `topk` regions of largest affinity.

    Maps whose sides `n_win` does not divide are filled up on the right and bottom, by the rule of one of the
    two official operators. `pad="input"`: zero pixels before the projection, so that their keys and values
    are its bias, and they count in the region means. `pad="projected"` (the NCHW operator): regions of
    `floor(side / n_win)` pixels, hence possibly more than `n_win` a side, zero keys and values, not counted
    in the means. In both the filled-up pixels take part in the softmax.

    Args:
        dim: channels.
        num_heads: attention heads; all heads of a region share its routing.
        n_win: regions per side.
        topk: regions that each region attends to, at most all there are.
        side_dwconv: kernel size of the local enhancement, a depthwise convolution of the values.
        pad: the rule for other sizes.
        auto_pad: False refuses sizes that `n_win` does not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        side_dwconv: int = 5,
        pad: Literal["input", "projected"] = "input",
        auto_pad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.pad = pad
        self.auto_pad = auto_pad
        # The full width, not the width of a head: the official code scales both levels so.
        self.scale = dim**-0.5
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`.

        Raises:
            ValueError: a side that cannot be cut into `n_win` regions under the padding rule.
        """
        height, width = x.shape[1:3]
        region = self._region_size(height, width)
        if self.pad == "input":
            x = extend_to(x, self.n_win * region[0], self.n_win * region[1])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        indices = topk_regions(q, k, region, self.topk)
        local = on_nhwc(self.lepe, v.flatten(3))
        if self.pad == "projected":
            q, k, v = (fill_up(t.flatten(3), region).unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        out = routed_attention(q, k, v, indices, region, scale=self.scale, distinct=True).flatten(3)
        return self.proj(out[:, :height, :width] + local[:, :height, :width])

    def _region_size(self, height: int, width: int) -> tuple[int, int]:
        n = self.n_win
        if not self.auto_pad and (height % n or width % n):
            raise ValueError(f"auto_pad=False needs maps divisible by n_win={n}, got {height}x{width}")
        if self.pad == "input":
            return -(-height // n), -(-width // n)
        if min(height, width) < n:
            raise ValueError(f"a map of {height}x{width} cannot be cut into n_win={n} regions per side")
        return height // n, width // n
