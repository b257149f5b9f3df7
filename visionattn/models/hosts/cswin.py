"""CSwin, with the attention of its first stages as a part (https://arxiv.org/abs/2107.00652)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import window_attention
from visionattn.kernels.checks import pair
from visionattn.layers.linear import Linear
from visionattn.layers.maps import fill_up, on_nhwc
from visionattn.models.frames.common import Block, Size, drop_path_rates
from visionattn.models.frames.pyramid import PatchEmbedding, Pyramid, Stage
from visionattn.models.hosts.guest import Guest, pyramid_arguments
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Layout, Weights


class CSwin(Pyramid):
    """CSwin, its first stages with the guest's attention, the others with cross-shaped windows.

    The last stage attends inside one window of the whole map.

    Args:
        guest: the attention of the first blocks.
        global_blocks: how many of the first blocks of each stage have it.
        img_size: training size in pixels, or (height, width): that of position biases.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        stripe: width of a stripe in pixels.
        extra_norms: a LayerNorm per returned stage output.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        guest: Guest,
        global_blocks: Sequence[int] = (2, 4, 0, 0),
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        stripe: int = 7,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        last = len(depths) - 1
        stages = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            # The stem's convolution rounds to the nearest quarter, the others round up.
            size = (-(-((height + 1) // 4) // 2**i), -(-((width + 1) // 4) // 2**i))
            blocks = []
            for j in range(depth):
                if j < global_blocks[i]:
                    attn = guest.attention(dim, num_heads[i], stage=i, size=size, prefix=False, **dd)
                    blocks.append(guest.block(dim, attn, drop_path=next(rates), **dd))
                else:
                    attn = StripeAttention(dim, num_heads[i], None if i == last else stripe, **dd)
                    blocks.append(Block(dim, attn, drop_path=next(rates), **dd))
            down = PatchEmbedding(dim // 2, dim, 3, 2, 1, **dd) if i else nn.Identity()
            stages.append(Stage(dim, down, blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=PatchEmbedding(in_chans, embed_dim, 7, 4, 2, **dd),
            stages=stages,
            norm=nn.LayerNorm(stages[-1].dim, eps=1e-5, **dd),
            norm_eps=1e-5,
            extra_norms=extra_norms,
            min_size=3,
            **dd,
        )


class StripeAttention(nn.Module):
    """CSwin's attention: half of the heads in vertical, half in horizontal stripes, or all in one window.

    A depthwise 3x3 convolution of the values, which sees zeros beyond its stripe, replaces a position bias. A
    last stripe may be narrower.

    Args:
        dim: channels.
        num_heads: attention heads.
        stripe: width of a stripe in pixels; None for one window of the whole map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.stripe = stripe
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        branches = 1 if stripe is None else 2
        width = dim // branches
        self.lepe = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width, **dd) for _ in range(branches)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        height, width = x.shape[1:3]
        windows = [(height, width)]
        if self.stripe is not None:
            windows = [(height, self.stripe), (self.stripe, width)]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        branches = []
        for part, window, lepe in zip(qkv.chunk(len(windows), 4), windows, self.lepe):
            q, k, v = part.unbind(3)
            out = window_attention(q, k, v, window).flatten(3)
            branches.append(out + _convolve_windows(lepe, v.flatten(3), window))
        return self.proj(torch.cat(branches, -1) if len(branches) > 1 else branches[0])


def _convolve_windows(conv: nn.Module, x: Tensor, window: Size) -> Tensor:
    """A convolution of `[B, H, W, C]` that sees zeros beyond each window."""
    height, width = x.shape[1:3]
    x = fill_up(x, window).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3)
    rows, columns = x.shape[1:3]
    x = on_nhwc(conv, x.flatten(0, 2)).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def layout(guest: Guest) -> Layout:
    """How weights of CSwin with a guest are recognised and converted."""
    return Layout(
        family=guest.family,
        model_cls=CSwin,
        marks=(r"\.attn\.lepe\.0\.", rf"\.attn\.{re.escape(guest.mark)}$"),
        rename=_rename,
        convert=lambda weights: _convert(weights, guest),
        fit=guest.fit,
        reads={"stem.proj.weight": 4, "stages.0.blocks.0.norm1.weight": 1},
        arguments=lambda ours, official: _arguments(ours, guest),
        to_official=_to_official,
        wrapper="model",
        unlearned=(*guest.unlearned, "stripe"),
    )


_NAMES = Names(
    ("^stage1_conv_embed.0.", "^stem.proj."),
    ("^stage1_conv_embed.2.", "^stem.norm."),
    *((f"^merge{i}.conv.", f"^stages.{i}.downsample.proj.") for i in range(1, 8)),
    *((f"^merge{i}.norm.", f"^stages.{i}.downsample.norm.") for i in range(1, 8)),
    *((f"^stage{i + 1}.", f"^stages.{i}.blocks.") for i in range(8)),
    ("^stages.#.blocks.#.qkv.", "^stages.#.blocks.#.attn.qkv."),
    ("^stages.#.blocks.#.proj.", "^stages.#.blocks.#.attn.proj."),
    (".attns.#.get_v.", ".attn.lepe.#."),
    *CLASSIFIER,
)
# Of an attention, what the authors keep in the block or per branch; what a guest adds lies in branch 0.
_OF_HOST = re.compile(r"\.attn\.(?:qkv|proj|lepe)\.")


def _rename(name: str) -> str:
    return _NAMES.to_ours(name).replace(".attns.0.", ".attn.")


def _convert(weights: dict[str, Tensor], guest: Guest) -> dict[str, Tensor]:
    """The convolution of a guest, which the authors name as that of stripes, under its own name."""
    out = dict(weights)
    for name in weights:
        block, found, leaf = name.partition("attn.lepe.0.")
        if found and f"{block}attn.{guest.mark}" in weights:
            out[f"{block}attn.dwc.{leaf}"] = out.pop(name)
    return out


def _to_official(weights: Weights, model: CSwin) -> dict[str, Tensor]:
    out = {}
    for name, value in weights.items():
        name = name.replace(".attn.dwc.", ".attn.lepe.0.")
        name = name if _OF_HOST.search(name) else name.replace(".attn.", ".attns.0.")
        out[_NAMES.to_official(name)] = value
    return out


def _arguments(ours: Shapes, guest: Guest) -> dict[str, Any] | None:
    out = pyramid_arguments(ours, guest)
    return out and {**out, "embed_dim": ours["stages.0.blocks.0.norm1.weight"][0]}
