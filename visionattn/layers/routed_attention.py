"""Attention to regions that a selector lists, as a layer for any network on `[B, H, W, C]` maps."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionattn.errors import nearest
from visionattn.kernels import routed_attention
from visionattn.kernels.checks import pair
from visionattn.kernels.routed.selectors.table import SELECTORS, Selector
from visionattn.layers.linear import Linear
from visionattn.layers.maps import extend_to, on_nhwc


class RoutedAttention2d(nn.Module):
    """Multi-head attention of every region of a map to the regions on its list.

    Example:
        >>> few = RoutedAttention2d(64, 2, "topk", 7, topk=4)
        >>> most = RoutedAttention2d(64, 2, "antidiagonal", 8, threshold=0.9, stride=4)
        >>> few(torch.randn(1, 30, 40, 64)).shape, most(torch.randn(1, 30, 40, 64)).shape
        (torch.Size([1, 30, 40, 64]), torch.Size([1, 30, 40, 64]))

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads.
        selector: how lists are made: the name of a selector, or a `Selector`. `"topk"`: the `topk` regions of
            largest affinity (BiFormer, `visionattn.kernels.topk_regions`); `"antidiagonal"`: the fewest that
            hold `threshold` of the attention (XAttention, `antidiagonal_regions`); `"bound"` (LServe,
            `bound_regions`); `"gated"`: lists for every pixel (VMoBA, `gated_regions`); `"hierarchical"`
            (HiP, `hierarchical_regions`); `"mass"`: by the exact attention (AdaSpa, `mass_regions`);
            `"quantized"` (SALE, `quantized_regions`).
        region_size: side of a region in pixels, or (height, width); None makes the whole map one region.
        pad: how maps that regions do not divide are filled up on the right and bottom. None: not at all,
            border regions are smaller. `"input"`: zero pixels before the projection, so that their keys and
            values are its bias, and they count in the choice of regions. `"projected"`: zero keys and values,
            which do not count there. In both the filled-up pixels take part in the softmax.
        side_dwconv: kernel size of the local enhancement, a depthwise convolution of the values that is added
            to the attention; 0 for none.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        scale: multiplies q·k; `head_dim ** -0.5` by default.
        options: arguments of the selector.

    Raises:
        ValueError: an unknown selector, options that it does not take or lacks, or a dim that num_heads does
            not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        selector: str | Selector = "topk",
        region_size: int | tuple[int, int] | None = 7,
        *,
        pad: Literal["input", "projected"] | None = None,
        side_dwconv: int = 0,
        qkv_bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.selector = _selector(selector, options)
        self.options = options
        self.region_size = None if region_size is None else pair("region_size", region_size)
        self.pad = pad
        self.scale = scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = None
        if side_dwconv:
            self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        region, filled = self.cut(height, width)
        if self.pad == "input":
            x = extend_to(x, *filled)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        indices = self.selector.regions(q, k, region, **self.options)
        local = None if self.lepe is None else on_nhwc(self.lepe, v.flatten(3))
        if self.pad == "projected":
            maps = (extend_to(t.flatten(3), *filled) for t in (k, v))
            k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in maps)
        out = routed_attention(
            q,
            k,
            v,
            indices,
            region,
            scale=self.scale,
            query_region_size=1 if self.selector.per_pixel else None,
            distinct=True,
            full=self.selector.is_full,
        )
        out = out.flatten(3)[:, :height, :width]
        return self.proj(out if local is None else out + local[:, :height, :width])

    def cut(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (height, width) of a region of a map, and of the map where `pad` fills it up."""
        rows, columns = self.region_size or (height, width)
        return (rows, columns), (rows * -(-height // rows), columns * -(-width // columns))


def _selector(selector: str | Selector, options: dict[str, Any]) -> Selector:
    """The selector of this name, after a look at its options."""
    if isinstance(selector, str):
        if selector not in SELECTORS:
            raise ValueError(f"selector={selector!r} is unknown; {nearest(selector, SELECTORS)}")
        selector = SELECTORS[selector]
    parameters = list(inspect.signature(selector.regions).parameters.values())[3:]
    names = [parameter.name for parameter in parameters]
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    unknown = [name for name in options if name not in names]
    if needed or unknown:
        said = f"needs {', '.join(needed)}" if needed else f"takes no {', '.join(unknown)}"
        raise ValueError(f"the selector {said}; its options are {', '.join(names)}")
    return selector
