"""Bi-level routing attention as a layer for any network on `[B, H, W, C]` maps.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
https://arxiv.org/abs/2303.08810.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from visionattn.layers.routed_attention import RoutedAttention2d


class BiLevelRoutingAttention(RoutedAttention2d):
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
        given: dict[str, Any] = {"device": device, "dtype": dtype, "pad": pad, "side_dwconv": side_dwconv}
        # The scale of the full width, not of the width of a head: the official code has it at both levels.
        super().__init__(dim, num_heads, "topk", None, scale=dim**-0.5, topk=topk, **given)
        self.n_win = n_win
        self.topk = topk
        self.auto_pad = auto_pad

    def cut(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes of a region and of the filled-up map.

        Raises:
            ValueError: a side that cannot be cut into `n_win` regions under the padding rule.
        """
        rows, columns = region = self.region_size_of(height, width)
        if self.pad == "input":
            return region, (self.n_win * rows, self.n_win * columns)
        return region, (rows * -(-height // rows), columns * -(-width // columns))

    def region_size_of(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of a region of a map of this size.

        Raises:
            ValueError: a side that cannot be cut into `n_win` regions under the padding rule.
        """
        n = self.n_win
        if not self.auto_pad and (height % n or width % n):
            raise ValueError(f"auto_pad=False needs maps divisible by n_win={n}, got {height}x{width}")
        if self.pad == "input":
            return -(-height // n), -(-width // n)
        if min(height, width) < n:
            raise ValueError(f"a map of {height}x{width} cannot be cut into n_win={n} regions per side")
        return height // n, width // n
