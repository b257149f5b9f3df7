"""SMT: depthwise convolutions of several scales that modulate values, then more and more attention.

Paper: "Scale-Aware Modulation Meet Transformer", ICCV 2023, https://arxiv.org/abs/2307.08579. Official code
and weights: https://github.com/AFeng-x/SMT (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from visionattn.kernels import dense_attention
from visionattn.layers.as_made import is_as_made
from visionattn.layers.linear import Linear, Mlp, is_disposable, overwritten
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import Block, build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import MapSequential, PatchEmbedding, Pyramid, Stage
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, register

__all__ = ["SMT"]


class Modulation(nn.Module):
    """Values times a modulator, which convolutions of growing kernels make; no softmax (section 3.1).

    Head i convolves its channels with a kernel of 3 + 2 i. Groups of one channel of every head are mixed,
    then all channels.

    Args:
        dim: channels.
        num_heads: heads, and hence scales.
        expand_ratio: width of the mixed features as a multiple of `dim`.
        qkv_bias: whether the projections of the input have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        expand_ratio: int = 2,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim, hidden_dim = dim // num_heads, dim * expand_ratio
        self.v = Linear(dim, dim, bias=qkv_bias, **dd)
        self.s = Linear(dim, dim, bias=qkv_bias, **dd)
        self.local_convs = nn.ModuleList(
            nn.Conv2d(head_dim, head_dim, 3 + 2 * i, padding=1 + i, groups=head_dim, **dd)
            for i in range(num_heads)
        )
        self.proj0 = nn.Conv2d(dim, hidden_dim, 1, groups=head_dim, **dd)
        self.bn = nn.BatchNorm2d(hidden_dim, **dd)
        self.act = nn.GELU()
        self.proj1 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        v = self.v(x)
        heads = self.s(x).permute(0, 3, 1, 2).chunk(len(self.local_convs), 1)
        scales = [conv(head) for conv, head in zip(self.local_convs, heads)]
        # Few channels at a time are mixed: in planes these are sums of long rows.
        mixed = self._mix(torch.stack(scales, 2).flatten(1, 2).contiguous())
        modulator = self.proj1(mixed).permute(0, 2, 3, 1)
        return self.proj(v.mul_(modulator) if is_disposable(self.v) else modulator * v)

    def _mix(self, x: Tensor) -> Tensor:
        """The scales of every channel, one after the other, `[B, C, H, W]`, to mixed ones `[B, C', H, W]`."""
        as_made = is_as_made(nn.Conv2d, self.proj0) and is_as_made(nn.BatchNorm2d, self.bn)
        if self.training or not (as_made and is_disposable()):
            return self.act(self.bn(self.proj0(x)))
        conv, bn = self.proj0, self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        return overwritten(self.act, F.conv2d(x, weight, bias, groups=conv.groups))


class Attention(nn.Module):
    """Attention among all pixels, and a depthwise convolution of the values beside it.

    Args:
        dim: channels.
        num_heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
        heads = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return self.proj(dense_attention(*heads).flatten(3) + on_nhwc(self.local_conv, v))


class ConvMlp(Mlp):
    """An MLP whose hidden features are added to a depthwise 3x3 convolution of them, before the GELU."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = self.fc1(x)
        local = on_nhwc(self.dwconv, x)
        x = x.add_(local) if is_disposable(self.fc1, self.dwconv) else x + local
        return self.fc2(overwritten(self.act, x))


class ScaleAwareBlock(Block):
    """Modulation or attention, then the convolutional MLP."""

    mlp_cls = ConvMlp

    def feed_forward(self, x: Tensor) -> Tensor:
        """`x` and the MLP branch, which sees neighbours: no piece of the map can be computed alone."""
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class NormedStage(Stage):
    """A stage with a norm behind its blocks, which the next stage sees too."""

    def __init__(self, dim: int, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module):
        super().__init__(dim, downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, dim]`."""
        return self.norm(super().forward(x))


class SMT(Pyramid):
    """SMT. It has no position embedding and fills nothing up; images have at least 3 pixels a side.

    The official dense backbones are the same network: their stages give the same normalised maps.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: blocks per stage.
        embed_dims: channels per stage.
        modulation_heads: heads of the modulation per stage; 0 for a stage of attention alone.
        num_heads: attention heads per stage; 0 for a stage of modulation alone. In a stage with both, every
            other block has attention, the first one modulation.
        mlp_ratios: hidden width of the MLPs per stage, as a multiple of its channels.
        expand_ratio: width of the modulators' hidden features as a multiple of the channels.
        stem_kernel: side of the first convolution, odd.
        qkv_bias: whether the projections that modulation and attention begin with have a bias.
        layer_scale: initial factor per channel of every branch, None for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 1),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        modulation_heads: Sequence[int] = (4, 4, 4, 0),
        num_heads: Sequence[int] = (0, 0, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        expand_ratio: int = 2,
        stem_kernel: int = 3,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, scales, heads) in enumerate(zip(embed_dims, modulation_heads, num_heads)):
            blocks = []
            for j in range(depths[i]):
                if scales and not (heads and j % 2):
                    attn = Modulation(dim, scales, expand_ratio, qkv_bias, **dd)
                else:
                    attn = Attention(dim, heads, qkv_bias, **dd)
                blocks.append(ScaleAwareBlock(dim, attn, mlp_ratios[i], next(rates), 1e-6, layer_scale, **dd))
            down = PatchEmbedding(embed_dims[i - 1], dim, 3, 2, padding=1, **dd) if i else nn.Identity()
            stages.append(NormedStage(dim, down, blocks, nn.LayerNorm(dim, eps=1e-6, **dd)))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=_stem(in_chans, embed_dims[0], stem_kernel, dd),
            stages=stages,
            norm=nn.Identity(),
            norm_eps=1e-6,
            extra_norms=False,
            min_size=3,
            **dd,
        )
        self.apply(_init_convolution)


def _stem(in_chans: int, dim: int, kernel: int, dd: dict[str, Any]) -> nn.Sequential:
    convolutions = MapSequential(
        nn.Conv2d(in_chans, dim, kernel, stride=2, padding=kernel // 2, bias=False, **dd),
        nn.BatchNorm2d(dim, **dd),
        nn.ReLU(),
        nn.Conv2d(dim, dim, 2, stride=2, **dd),
    )
    return nn.Sequential(convolutions, nn.LayerNorm(dim, eps=1e-5, **dd))


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Stages and scales are counted from 1.
_NAMES = Names(
    *((f".attn.local_conv_{i + 1}.", f".attn.local_convs.{i}.") for i in range(8)),
    (".mlp.dwconv.dwconv.", ".mlp.dwconv."),
    (".gamma_1$", ".ls1.gamma$"),
    (".gamma_2$", ".ls2.gamma$"),
    ("^patch_embed1.conv.", "^stem.0."),
    ("^patch_embed1.norm.", "^stem.1."),
    *((f"^patch_embed{i + 1}.", f"^stages.{i}.downsample.") for i in range(1, 8)),
    *((f"^block{i + 1}.", f"^stages.{i}.blocks.") for i in range(8)),
    *((f"^norm{i + 1}.", f"^stages.{i}.norm.") for i in range(8)),
    *CLASSIFIER,
)
# The dense backbones call the convolution beside attention otherwise.
_DENSE_NAMES = Names((".attn.dw_conv.", ".attn.local_conv."))


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    depths = ours.lengths("stages", "blocks")
    stages = [f"stages.{i}.blocks.0" for i in range(len(depths))]
    dims = tuple(ours[f"{stage}.norm1.weight"][0] for stage in stages)
    expanded = ours.get("stages.0.blocks.0.attn.proj1.weight", 4)
    return {
        "in_chans": ours["stem.0.0.weight"][1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "embed_dims": dims,
        "modulation_heads": tuple(ours.length(f"{stage}.attn.local_convs") for stage in stages),
        "mlp_ratios": tuple(ours[f"{s}.mlp.fc1.weight"][0] / dim for s, dim in zip(stages, dims)),
        **({"expand_ratio": expanded[1] // dims[0]} if expanded else {}),
        "stem_kernel": ours["stem.0.0.weight"][-1],
        "qkv_bias": any(name.endswith((".attn.v.bias", ".attn.q.bias")) for name in ours.names),
        "layer_scale": 1e-4 if "stages.0.blocks.0.ls1.gamma" in ours else None,
    }


LAYOUT = Layout(
    family="smt",
    model_cls=SMT,
    marks=(r"^stages\.0\.blocks\.0\.attn\.local_convs\.0\.weight$", r"\.mlp\.dwconv\.weight$"),
    rename=(_DENSE_NAMES + _NAMES).to_ours,
    reads={
        "stem.0.0.weight": 4,
        "stages.#.blocks.0.norm1.weight": 1,
        "stages.#.blocks.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_NAMES.official_weights,
    wrapper="model",
    unlearned=("num_heads",),
)


def _cfg(file: str, result: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://github.com/AFeng-x/SMT/releases/download/v1.0.0/{file}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "min_input_size": (3, 3, 3),
        "first_conv": "stem.0.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2307.08579",
        "paper_name": "Scale-Aware Modulation Meet Transformer",
        "origin_url": "https://github.com/AFeng-x/SMT",
        "notes": (f"ImageNet-1k top-1 {result}",) if result else (),
        **kwargs,
    }


_AT_384: dict[str, Any] = {
    "input_size": (3, 384, 384),
    "pool_size": (12, 12),
    "crop_pct": 1.0,
    "crop_mode": "squash",
}

default_cfgs = generate_default_cfgs(
    {
        "smt_t.in1k": _cfg("smt_tiny", "82.2"),
        "smt_s.in1k": _cfg("smt_small", "83.7"),
        "smt_b.in1k": _cfg("smt_base", "84.3"),
        "smt_l.in22k_ft_in1k": _cfg("smt_large_22k_224_ft", "87.1"),
        "smt_l.in22k_ft_in1k_384": _cfg("smt_large_22k_384_ft", "88.1", **_AT_384),
        "smt_l.in22k": _cfg("smt_large_22k", num_classes=21841),
    }
)

_BASE: dict[str, Any] = {"depths": (4, 6, 28, 2), "mlp_ratios": (8, 6, 4, 2), "stem_kernel": 7}

VARIANTS = {
    "smt_t": Variant("SMT-T: 11.5 M parameters, 2.4 GMACs at 224."),
    "smt_s": Variant("SMT-S: 22.6 M parameters, 4.7 GMACs at 224.", depths=(3, 4, 18, 2)),
    "smt_b": Variant("SMT-B: 32.0 M parameters, 7.7 GMACs at 224.", **_BASE),
    "smt_l": Variant(
        "SMT-L, with layer scale: 80.6 M parameters, 17.6 GMACs at 224.",
        **{**_BASE, "depths": (4, 6, 28, 4)},
        embed_dims=(96, 192, 384, 768),
        layer_scale=1e-4,
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
