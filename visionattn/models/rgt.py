"""RGT: super-resolution by rectangle windows and cross-attention to a recursively shrunken map.

Paper: "Recursive Generalization Transformer for Image Super-Resolution", ICLR 2024,
https://arxiv.org/abs/2303.06373. Official code and weights: https://github.com/zhengchen1999/RGT
(Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers.bands import convolved, pixelwise
from visionattn.layers.linear import Linear
from visionattn.layers.maps import on_nhwc
from visionattn.layers.windows.rectangle_window import RectangleWindowAttention
from visionattn.models.frames.common import drop_path_rates, init_linear
from visionattn.models.frames.restorer import (
    ResidualGroup,
    ResidualRestorer,
    RestorationInfo,
    body_arguments,
    build_restoration,
    super_resolution_cfg,
)
from visionattn.models.hosts.swin_buffers import shift_mask, window_index, window_offsets
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes, window_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["RGT"]

# The recursion must leave a pixel after two reductions by 4.
_MIN_SIZE = 16


class RecursiveGeneralizationAttention(nn.Module):
    """Cross-attention of all pixels to a small map, which one strided convolution makes recursively (RG-SA).

    The convolution shrinks by 4 and is applied until the longer side is below 64 pixels, at least twice, and
    in training until it is below 16. The official code shrinks an elongated map (one side from 1024, the
    other below 64) to nothing and fails; here the shorter side keeps at least a pixel.

    Args:
        dim: channels of queries and values.
        num_heads: attention heads.
        c_ratio: channels of queries and keys as a fraction of `dim`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        c_ratio: float = 0.5,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        reduced = int(dim * c_ratio)
        self.num_heads = num_heads
        self.reduction = nn.Conv2d(dim, dim, 4, stride=4, groups=dim, **dd)
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.conv = Linear(dim, reduced, **dd)
        self.norm = nn.LayerNorm(reduced, **dd)
        self.q = Linear(dim, reduced, bias=qkv_bias, **dd)
        self.k = Linear(reduced, reduced, bias=qkv_bias, **dd)
        self.v = Linear(reduced, dim, bias=qkv_bias, **dd)
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def add_to(self, x: Tensor, norm: nn.Module, drop_path: nn.Module) -> Tensor:
        """`x + drop_path(attention(norm(x)))` of a map `[B, H, W, C]`, by bands."""
        times = self.reductions(x.shape[1], x.shape[2], self.training)
        whole = x[:, : x.shape[1] // 4 * 4] if times else x
        reduce = self.reduction if times else nn.Identity()
        rows_per_row = Fraction(1, 4) if times else 1
        small = convolved(lambda rows: on_nhwc(reduce, norm(rows)), whole, scale=rows_per_row)
        for _ in range(times - 1):
            small = on_nhwc(self.reduction, small)
        small = F.gelu(self.norm(self.conv(on_nhwc(self.dwconv, small))))
        v = self.v(small)
        v = self._heads(v + on_nhwc(self.cpe, v))
        k = self._heads(self.k(small))
        # Fused attention, which holds no scores, wants heads of one width: zeros change no product.
        scale, fill = k.shape[-1] ** -0.5, (0, max(v.shape[-1] - k.shape[-1], 0))
        k = F.pad(k, fill)

        def attend(rows: Tensor) -> Tensor:
            q = F.pad(self._heads(self.q(norm(rows))), fill)
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
            return rows + drop_path(self.proj(out.transpose(1, 2).reshape(rows.shape)))

        return pixelwise(attend, x)

    @staticmethod
    def reductions(height: int, width: int, training: bool) -> int:
        """How often a map is shrunk by 4: `floor(log4(longer side / unit))`, the unit 16, in training 4."""
        unit, times = (4, 0) if training else (16, 2)
        while unit * 4 ** (times + 1) <= max(height, width) and 4 ** (times + 1) <= min(height, width):
            times += 1
        return times

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, heads, H * W, d]` of `[B, H, W, C]`."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GatedMlp(nn.Module):
    """An MLP whose hidden half is gated by a depthwise convolution of the other, normalised half."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        half = hidden_dim // 2
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.norm = nn.LayerNorm(half, **dd)
        self.conv = nn.Conv2d(half, half, 3, padding=1, groups=half, **dd)
        self.fc2 = Linear(half, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x, gate = F.gelu(self.fc1(x)).chunk(2, -1)
        return self.fc2(x * on_nhwc(self.conv, self.norm(gate)))


class Block(nn.Module):
    """Attention and MLP on `[B, H, W, C]`, then the scaled input of the whole block (HAI)."""

    def __init__(
        self,
        dim: int,
        attn: RectangleWindowAttention | RecursiveGeneralizationAttention,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio), **dd)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-4, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn.add_to(x, self.norm1, self.drop_path)

        def finish(y: Tensor, x: Tensor) -> Tensor:
            return y + self.drop_path(self.mlp(self.norm2(y))) + self.gamma * x

        return convolved(finish, y, x, halo=1)


class RGT(ResidualRestorer):
    """RGT for super-resolution; images `[B, in_chans, H, W]` in [0, 1] to `[B, in_chans, s * H, s * W]`.

    Any size from 16 pixels a side works without padding the image. Every second block attends to the whole
    image: tiles give other numbers.

    Args:
        in_chans: image channels; the mean colour is subtracted for 3 only.
        upscale: 2, 3, 4 or 8.
        embed_dim: channels of the body.
        depths: blocks per group; even ones attend in windows, odd ones to the shrunken map.
        num_heads: attention heads.
        split_size: (height, width) of the first half of the heads' windows, transposed for the other half.
        c_ratio: channels of queries and keys in the cross-attention as a fraction of `embed_dim`.
        mlp_ratio: hidden width of the MLPs as a multiple of `embed_dim`.
        qkv_bias: bias of the query, key and value projections.
        img_range: factor on the image before the network, undone after it.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 (0.1 in official
            training).

    Raises:
        ValueError: an `upscale` without an upsampler, or heads that are odd or do not divide the channels.
    """

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 4,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6, 6, 6),
        num_heads: int = 6,
        split_size: tuple[int, int] = (8, 32),
        c_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        img_range: float = 1.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def attention(group: int, block: int) -> RectangleWindowAttention | RecursiveGeneralizationAttention:
            if block % 2:
                return RecursiveGeneralizationAttention(embed_dim, num_heads, c_ratio, qkv_bias, **dd)
            # Every second window attention shifts: blocks 2, 6, ... of even groups, 0, 4, ... of odd ones.
            shifted = block % 4 == (0 if group % 2 else 2)
            return RectangleWindowAttention(
                embed_dim, num_heads, split_size, shifted, qkv_bias=qkv_bias, **dd
            )

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        layers = []
        for group, depth in enumerate(depths):
            blocks = [
                Block(embed_dim, attention(group, i), mlp_ratio, next(rates), **dd) for i in range(depth)
            ]
            layers.append(ResidualGroup(embed_dim, blocks, **dd))

        info = RestorationInfo(
            task="super-resolution",
            upscale=upscale,
            channels=in_chans,
            min_size=_MIN_SIZE,
            exact_tiling=False,
            half_safe=False,
        )
        super().__init__(info, embed_dim, layers, img_range, embed_norm=True, **dd)
        self.add_tail(**dd)
        self.apply(init_linear)


_NAMES = Names(
    ("^before_RG.1.", "^embed_norm."),
    (".attn.get_v.", ".attn.lepe."),
    (".attn.attns.#.pos.", ".attn.position_bias.#."),
    (".attn.reduction1.", ".attn.reduction."),
    (".attn.norm_act.0.", ".attn.norm."),
    (".mlp.sg.norm.", ".mlp.norm."),
    (".mlp.sg.conv.", ".mlp.conv."),
)
_BUFFERS = ("rpe_biases", "relative_position_index", "attn_mask_0", "attn_mask_1")
# The map for which the authors' code stores masks: their training patch.
_MASKED_SIDE = 64


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without stored offsets, indices and masks; the official 1x1 convolution becomes a linear layer."""
    return {
        name: value.flatten(1) if name.endswith(".attn.conv.weight") and value.ndim == 4 else value
        for name, value in weights.items()
        if not name.endswith(_BUFFERS)
    }


def _to_official(weights: Weights, model: RGT) -> dict[str, Tensor]:
    """Our weights in the authors' names, with the offsets, indices and masks that their code stores."""
    out = {}
    for name, value in weights.items():
        value = value[..., None, None] if name.endswith(".attn.conv.weight") else value
        out[_NAMES.to_official(name)] = value
    for path, attn in model.named_modules():
        if not isinstance(attn, RectangleWindowAttention):
            continue
        for i, window in enumerate(attn.windows):
            out[f"{path}.attns.{i}.rpe_biases"] = window_offsets(window)
            out[f"{path}.attns.{i}.relative_position_index"] = window_index(window)
            if attn.shifted:
                side = -(-_MASKED_SIDE // max(window)) * max(window)
                mask = shift_mask((side, side), window, (window[0] // 2, window[1] // 2))
                out[f"{path}.attn_mask_{i}"] = mask
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    out = body_arguments(ours)
    dim = out["embed_dim"]
    out |= {
        "num_heads": 2 * ours["layers.0.blocks.0.attn.position_bias.0.pos3.2.weight"][0],
        "mlp_ratio": ours["layers.0.blocks.0.mlp.fc1.weight"][0] / dim,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in ours,
    }
    if reduced := ours.get("layers.0.blocks.1.attn.conv.weight", 2):
        out["c_ratio"] = reduced[0] / dim
    index = official.get("layers.0.blocks.0.attn.attns.0.relative_position_index", 2)
    offsets = official.get("layers.0.blocks.0.attn.attns.0.rpe_biases", 2)
    if index and offsets and (window := window_of(index[0], offsets[0])):
        out["split_size"] = window
    return out


LAYOUT = Layout(
    family="rgt",
    model_cls=RGT,
    marks=(r"^embed_norm\.", r"\.gamma$", r"\.attn\.position_bias\."),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "conv_first.weight": 4,
        "layers.#.blocks.0.mlp.fc1.weight": 2,
        "layers.0.blocks.0.attn.position_bias.0.pos3.2.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="params",
    unlearned=("split_size", "img_range"),
)


def _cfg(results: str) -> dict[str, Any]:
    return super_resolution_cfg(
        results,
        min_size=_MIN_SIZE,
        paper_ids="arXiv:2303.06373",
        paper_name="Recursive Generalization Transformer for Image Super-Resolution",
        origin_url="https://github.com/zhengchen1999/RGT",
        description="weights: https://drive.google.com/drive/folders/1UNn5LvnfQAi6eHAHz-mTYWu8vCJs5kwu",
    )


# The authors share a folder, from which nothing can be loaded directly.
default_cfgs = generate_default_cfgs(
    {
        "rgt_s_x2.df2k": _cfg("38.56/.9627 34.77/.9270 32.59/.9050 34.32/.9457 40.18/.9805"),
        "rgt_s_x3.df2k": _cfg("35.11/.9328 31.05/.8548 29.53/.8164 30.18/.8884 35.39/.9548"),
        "rgt_s_x4.df2k": _cfg("32.98/.9047 29.18/.7966 27.98/.7509 27.89/.8347 32.38/.9281"),
        "rgt_x2.df2k": _cfg("38.59/.9628 34.83/.9272 32.62/.9050 34.47/.9467 40.34/.9808"),
        "rgt_x3.df2k": _cfg("35.15/.9329 31.13/.8550 29.55/.8165 30.28/.8899 35.55/.9553"),
        "rgt_x4.df2k": _cfg("33.12/.9060 29.23/.7972 28.00/.7513 27.98/.8369 32.50/.9291"),
    }
)


_RGT_S: dict[str, Any] = {"depths": (6,) * 6}

VARIANTS = {
    "rgt_s_x2": Variant("RGT-S x2: 10.1 M parameters.", **_RGT_S, upscale=2),
    "rgt_s_x3": Variant("RGT-S x3: 10.2 M parameters.", **_RGT_S, upscale=3),
    "rgt_s_x4": Variant("RGT-S x4: 10.2 M parameters, 46.9 GMACs for a 64x64 input.", **_RGT_S, upscale=4),
    "rgt_x2": Variant("RGT x2: 13.2 M parameters.", upscale=2),
    "rgt_x3": Variant("RGT x3: 13.4 M parameters.", upscale=3),
    "rgt_x4": Variant("RGT x4: 13.4 M parameters, 61.0 GMACs for a 64x64 input.", upscale=4),
}
register(__name__, LAYOUT, VARIANTS, builder=build_restoration)
