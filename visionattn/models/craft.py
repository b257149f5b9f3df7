"""CRAFT: light super-resolution that refines a global by a high-frequency representation.

Paper: "Feature Modulation Transformer: Cross-Refinement of Global Representation via High-Frequency Prior for
Image Super-Resolution", ICCV 2023, https://arxiv.org/abs/2308.05022. Official code and weights:
https://github.com/AVC2-UESTC/CRAFT-SR (Apache-2.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.layers.as_made import is_as_made
from visionattn.layers.bands import convolved, folded, pixelwise
from visionattn.layers.linear import Linear, Mlp
from visionattn.layers.maps import is_needed, mirror_index, on_nhwc
from visionattn.layers.windows.rectangle_window import RectangleWindowAttention
from visionattn.models.frames.common import check_size, init_linear
from visionattn.models.frames.restorer import (
    ResidualGroup,
    ResidualRestorer,
    RestorationInfo,
    body_arguments,
    build_restoration,
    super_resolution_cfg,
)
from visionattn.models.hosts.swin_buffers import window_index, window_offsets
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes, window_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["CRAFT"]


class WindowBlock(nn.Module):
    """Attention in rectangle windows, then an MLP, on `[B, H, W, C]` (SRWAB).

    Shifted windows attend across the border of the image, which is a torus to them: the official code has a
    mask for that but never makes it, and its weights were trained so.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: tuple[int, int],
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = RectangleWindowAttention(dim, num_heads, split_size, shifted, False, qkv_bias, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn.add_to(x, self.norm1, nn.Identity())
        return pixelwise(lambda rows: rows + self.mlp(self.norm2(rows)), x, into=x)


class HighFrequencyBlock(nn.Module):
    """Half of the channels through a convolution, half through a maximum filter (HFERB); `[B, H, W, C]`."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        half = dim // 2
        self.conv = nn.Conv2d(half, half, 3, padding=1, **dd)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.fc = Linear(half, half, **dd)
        self.last_fc = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        def refine(x: Tensor) -> Tensor:
            local, peaks = x.chunk(2, -1)
            both = torch.cat((on_nhwc(self.conv, local), self.fc(on_nhwc(self.pool, peaks))), -1)
            return x + self.last_fc(F.gelu(both))

        return convolved(refine, x, halo=1)


class ChannelAttention(nn.Module):
    """Attention among channels: queries from the high frequencies, keys and values from the low ones.

    Queries and keys have length 1 over all positions of the image, so that every pixel depends on all others.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.q = Linear(dim, dim, bias=False, **dd)
        self.q_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.kv = Linear(dim, 2 * dim, bias=False, **dd)
        self.kv_dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False, **dd)
        self.proj = Linear(dim, dim, bias=False, **dd)

    def add_to(self, low: Tensor, high: Tensor, norm: nn.Module) -> Tensor:
        """`low + attention(norm(low), high)` of maps `[B, H, W, C]`, by bands."""
        weights = self._weights(low, high, norm).to(low.dtype)

        def attend(low: Tensor) -> Tensor:
            out = self._heads(self._keys_or_values(norm(low), 1)) @ weights.mT
            return low + self.proj(out.transpose(1, 2).reshape(low.shape))

        return convolved(attend, low, halo=1)

    def _weights(self, low: Tensor, high: Tensor, norm: nn.Module) -> Tensor:
        """Softmax weights `[B, heads, d, d]`; sums over an image need float32."""

        def correlate(sums: tuple[Tensor, ...], low: Tensor, high: Tensor, core: slice) -> tuple[Tensor, ...]:
            q, k = on_nhwc(self.q_dwconv, self.q(high)), self._keys_or_values(norm(low), 0)
            with without_autocast(q):
                q, k = (self._heads(at_least_float32(t[:, core])) for t in (q, k))
                terms = q.mT @ k, q.square().sum(-2), k.square().sum(-2)
                return tuple(a + b for a, b in zip(sums, terms))

        zero = at_least_float32(low.new_zeros(()))
        products, *squares = folded(correlate, (zero, zero, zero), low, high, halo=1)
        q_length, k_length = (s.sqrt().clamp(min=1e-12) for s in squares)
        cosines = products / (q_length[..., None] * k_length[..., None, :])
        return (cosines * self.temperature).softmax(-1)

    def _keys_or_values(self, x: Tensor, which: int) -> Tensor:
        if not (is_as_made(Linear, self.kv) and is_as_made(nn.Conv2d, self.kv_dwconv)):
            return on_nhwc(self.kv_dwconv, self.kv(x)).chunk(2, -1)[which]
        weight, kernel = (layer.weight.chunk(2)[which] for layer in (self.kv, self.kv_dwconv))
        x = F.linear(x, weight).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel, padding=1, groups=len(kernel)).permute(0, 2, 3, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, heads, H * W, d]` of `[B, H, W, C]`."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GatedMlp(nn.Module):
    """An MLP with a depthwise convolution, one half of whose output gates the other, on `[B, H, W, C]`."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, 2 * hidden_dim, bias=False, **dd)
        self.dwconv = nn.Conv2d(
            2 * hidden_dim, 2 * hidden_dim, 3, padding=1, groups=2 * hidden_dim, bias=False, **dd
        )
        self.fc2 = Linear(hidden_dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = on_nhwc(self.dwconv, self.fc1(x)).chunk(2, -1)
        return self.fc2(F.gelu(gate) * x)


class FusionBlock(nn.Module):
    """The low frequencies, refined by channel attention to the high ones, then an MLP (HFB)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = ChannelAttention(dim, num_heads, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = GatedMlp(dim, int(dim * 2.66), **dd)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """`[B, H, W, C]` twice to `[B, H, W, C]`."""
        x = self.attn.add_to(low, high, self.norm1)
        return convolved(lambda rows: rows + self.mlp(self.norm2(rows)), x, halo=1)


class Block(nn.Module):
    """Low frequencies from two window blocks, high ones from their own block, both fused; `[B, H, W, C]`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: tuple[int, int],
        mlp_ratio: float,
        qkv_bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.low = nn.Sequential(
            *(
                WindowBlock(dim, num_heads, split_size, shifted, mlp_ratio, qkv_bias, **dd)
                for shifted in (False, True)
            )
        )
        self.high = HighFrequencyBlock(dim, **dd)
        self.fuse = FusionBlock(dim, num_heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.low(x), self.high(x))


class CRAFT(ResidualRestorer):
    """CRAFT for super-resolution; images `[B, in_chans, H, W]` in [0, 1] to `[B, in_chans, s * H, s * W]`.

    Images are filled up on the right and bottom by their mirror image, edge pixels repeated, to a multiple of
    the longer side of the windows, and the output is cropped. Channel attention depends on the whole
    filled-up image: tiles and other paddings give other numbers.

    Args:
        in_chans: image channels; the mean colour is subtracted for 3 only.
        upscale: a positive factor.
        embed_dim: channels of the body.
        depths: blocks per group.
        num_heads: attention heads.
        split_size: (height, width) of the first half of the heads' windows, transposed for the other half.
        mlp_ratio: hidden width of the window blocks' MLPs as a multiple of `embed_dim`.
        qkv_bias: bias of the query, key and value projections in windows.
        img_range: factor on the image before the network, undone after it.
        pad: `"needed"` fills up sides that are no multiple; `"always"` adds a whole block to those that are,
            too, as the script that gave the published results does.

    Raises:
        ValueError: an unknown `pad`, or heads that are odd or do not divide the channels.
    """

    undecayed = ("temperature",)
    tail_halo = 1

    def __init__(
        self,
        in_chans: int = 3,
        upscale: int = 4,
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: int = 6,
        split_size: tuple[int, int] = (4, 16),
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        img_range: float = 1.0,
        pad: Literal["needed", "always"] = "needed",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if pad not in ("needed", "always"):
            raise ValueError(f"pad must be 'needed' or 'always', got {pad!r}")
        info = RestorationInfo(
            task="super-resolution",
            upscale=upscale,
            channels=in_chans,
            size_multiple=max(split_size),
            exact_tiling=False,
            half_safe=False,
        )

        def group(depth: int) -> ResidualGroup:
            blocks = [
                Block(embed_dim, num_heads, split_size, mlp_ratio, qkv_bias, **dd) for _ in range(depth)
            ]
            return ResidualGroup(embed_dim, blocks, **dd)

        super().__init__(info, embed_dim, map(group, depths), img_range, **dd)
        self.pad = pad
        self.upsample = nn.Sequential(
            nn.Conv2d(embed_dim, upscale**2 * in_chans, 3, padding=1, **dd), nn.PixelShuffle(upscale)
        )
        self.apply(_init_weights)

    def enlarge(self, y: Tensor) -> Tensor:
        """Features `[B, embed_dim, H, W]` to `[B, in_chans, upscale * H, upscale * W]`."""
        return self.upsample(y)

    def padded(self, x: Tensor) -> Tensor:
        """Images, continued on the right and bottom by their mirror image.

        Raises:
            ValueError: an image without pixels.
        """
        check_size(x, self.info.min_size)
        multiple = self.info.size_multiple
        for dim, side in zip((2, 3), x.shape[2:]):
            blocks = -(-side // multiple) if self.pad == "needed" else side // multiple + 1
            if is_needed(blocks * multiple - side):
                x = x.index_select(dim, mirror_index(side, blocks * multiple, x.device))
        return x


def _init_weights(module: nn.Module) -> None:
    # Elsewhere linear layers stand for the official 1x1 convolutions and keep their initialisation.
    if isinstance(module, WindowBlock):
        module.apply(init_linear)


# Pairs of window blocks stand inside the block that fuses them; nobody has more than 32 of these in a group.
_NAMES = Names(
    *(
        (f"^layers.#.residual_group.srwa_blocks.{2 * i + j}.", f"^layers.#.blocks.{i}.low.{j}.")
        for i in range(32)
        for j in range(2)
    ),
    ("^layers.#.residual_group.hfer_blocks.#.", "^layers.#.blocks.#.high."),
    ("^layers.#.residual_group.hf_blocks.#.", "^layers.#.blocks.#.fuse."),
    ("^norm.body.", "^norm."),
    (".low.#.get_v.", ".low.#.attn.lepe."),
    (".low.#.attns.#.pos.", ".low.#.attn.position_bias.#."),
    (".low.#.qkv.", ".low.#.attn.qkv."),
    (".low.#.proj.", ".low.#.attn.proj."),
    (".fuse.norm#.body.", ".fuse.norm#."),
    (".fuse.attn.project_out.", ".fuse.attn.proj."),
    (".fuse.ffn.project_in.", ".fuse.mlp.fc1."),
    (".fuse.ffn.dwconv.", ".fuse.mlp.dwconv."),
    (".fuse.ffn.project_out.", ".fuse.mlp.fc2."),
)
# Linear layers that are 1x1 convolutions in the official code.
_POINTWISE = re.compile(r"\.(?:fuse\.(?:attn\.(?:q|kv|proj)|mlp\.fc[12])|high\.(?:fc|last_fc))\.weight$")


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without stored offsets and indices; the 1x1 convolutions become linear layers."""
    return {
        name: value.flatten(1) if _POINTWISE.search(name) and value.ndim == 4 else value
        for name, value in weights.items()
        if not name.startswith(("relative_position_index_", "biases_"))
    }


def _to_official(weights: Weights, model: CRAFT) -> dict[str, Tensor]:
    """Our weights in the authors' names, with the offsets and indices that their code stores."""
    out = {}
    for name, value in weights.items():
        out[_NAMES.to_official(name)] = value[..., None, None] if _POINTWISE.search(name) else value
    attn = next(module for module in model.modules() if isinstance(module, RectangleWindowAttention))
    for direction, window in zip("hv", attn.windows):
        out[f"relative_position_index_{direction}"] = window_index(window)
        out[f"biases_{direction}"] = window_offsets(window)
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    body = body_arguments(ours)
    out = {
        **body,
        "upscale": math.isqrt(ours["upsample.0.weight"][0] // body["in_chans"]),
        "num_heads": ours["layers.0.blocks.0.fuse.attn.temperature"][0],
        "mlp_ratio": ours["layers.0.blocks.0.low.0.mlp.fc1.weight"][0] / body["embed_dim"],
        "qkv_bias": "layers.0.blocks.0.low.0.attn.qkv.bias" in ours,
    }
    index, offsets = official.get("relative_position_index_h", 2), official.get("biases_h", 2)
    if index and offsets and (window := window_of(index[0], offsets[0])):
        out["split_size"] = window
    return out


LAYOUT = Layout(
    family="craft",
    model_cls=CRAFT,
    marks=(r"\.fuse\.attn\.temperature$", r"\.low\.0\.", r"\.high\."),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "conv_first.weight": 4,
        "upsample.0.weight": 4,
        "layers.0.blocks.0.fuse.attn.temperature": 3,
        "layers.0.blocks.0.low.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="params",
    unlearned=("split_size", "img_range", "pad"),
)


def _cfg(results: str) -> dict[str, Any]:
    return super_resolution_cfg(
        results,
        paper_ids="arXiv:2308.05022",
        paper_name="Feature Modulation Transformer: Cross-Refinement of Global Representation via "
        "High-Frequency Prior for Image Super-Resolution",
        origin_url="https://github.com/AVC2-UESTC/CRAFT-SR",
        description="weights: https://drive.google.com/file/d/13wAmc93BPeBUBQ24zUZOuUpdBFG2aAY5",
    )


# The authors share an archive, from which nothing can be loaded directly.
default_cfgs = generate_default_cfgs(
    {
        "craft_x2.div2k": _cfg("38.23/.9615 33.92/.9211 32.33/.9016 32.86/.9343 39.39/.9786"),
        "craft_x3.div2k": _cfg("34.71/.9295 30.61/.8469 29.24/.8093 28.77/.8635 34.29/.9491"),
        "craft_x4.div2k": _cfg("32.52/.8989 28.85/.7872 27.72/.7418 26.56/.7995 31.18/.9168"),
    }
)

VARIANTS = {
    "craft_x2": Variant("CRAFT x2: 0.74 M parameters.", upscale=2),
    "craft_x3": Variant("CRAFT x3: 0.74 M parameters.", upscale=3),
    "craft_x4": Variant("CRAFT x4: 0.75 M parameters, 3.5 GMACs for a 64x64 input.", upscale=4),
}
register(__name__, LAYOUT, VARIANTS, builder=build_restoration)
