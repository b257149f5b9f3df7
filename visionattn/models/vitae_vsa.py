"""ViTAEv2 with varied-size windows: convolutions beside attention that chooses where its keys lie.

Papers: "VSA: Learning Varied-Size Window Attention in Vision Transformers", ECCV 2022,
https://arxiv.org/abs/2204.08446; "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image
Recognition and Beyond", https://arxiv.org/abs/2202.10108. Official code and weights:
https://github.com/ViTAE-Transformer/ViTAE-VSA. Its other host is `swin_vsa.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers import VariedSizeWindowAttention2d
from visionattn.layers.linear import Mlp
from visionattn.layers.maps import fill_up, on_nhwc
from visionattn.models.frames.common import Block, build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import Pyramid, Stage
from visionattn.models.hosts.swin_buffers import bias_table, stored_table, window_index
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["ViTAEVSA"]

# Of the four stages: sides of kernels, strides and dilations of the parallel convolutions; groups of the
# others.
_KERNELS, _STRIDES = (7, 3, 3, 3), (4, 2, 2, 2)
_DILATIONS = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
_REDUCTION_GROUPS, _NORMAL_GROUPS = (1, 16, 32, 64), (1, 32, 64, 128)


class Windows(NamedTuple):
    """How the windows of all attentions lie."""

    size: int
    dense: bool

    def attention(self, dim: int, heads: int, out_dim: int, **dd: Any) -> VariedSizeWindowAttention2d:
        """An attention from `dim` to `out_dim` channels."""
        unit = "swapped" if self.dense else "whole"
        return VariedSizeWindowAttention2d(dim, heads, self.size, out_dim, unit, self.dense, **dd)


class ParallelConvolutions(nn.Module):
    """Convolutions of several dilations side by side, each with a GELU; `[B, H, W, C]` in and out."""

    def __init__(self, in_dim: int, dim: int, stage: int, **dd: Any):
        super().__init__()
        kernel, stride = _KERNELS[stage], _STRIDES[stage]
        self.convs = nn.ModuleList()
        for dilation in _DILATIONS[stage]:
            padding = math.ceil(((kernel - 1) * dilation + 1 - stride) / 2)
            conv = nn.Conv2d(in_dim, dim, kernel, stride, padding, dilation, **dd)
            self.convs.append(nn.Sequential(conv, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([on_nhwc(conv, x) for conv in self.convs], -1)


class ReductionCell(nn.Module):
    """Downsampling by attention over parallel convolutions, and by convolutions in a row.

    Args:
        in_dim: channels in.
        embed_dim: channels of every parallel convolution.
        dim: channels out.
        num_heads: attention heads.
        stage: which one, from 0.
        wide: whether the convolutions in a row have `2 * dim` channels in between, not `embed_dim`.
        windows: of the attention.
    """

    def __init__(
        self,
        in_dim: int,
        embed_dim: int,
        dim: int,
        num_heads: int,
        stage: int,
        wide: bool,
        windows: Windows,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stride = _STRIDES[stage]
        self.prm = ParallelConvolutions(in_dim, embed_dim, stage, **dd)
        width = embed_dim * len(_DILATIONS[stage])
        self.pos_embed = nn.Conv2d(width, width, 7, padding=3, groups=width, **dd)
        self.norm1 = nn.LayerNorm(width, **dd)
        self.attn = windows.attention(width, num_heads, dim, **dd)
        inner, groups = 2 * dim if wide else embed_dim, _REDUCTION_GROUPS[stage]
        self.pcm = nn.Sequential(
            *_conv_norm_act(in_dim, inner, 2, groups, **dd),
            *_conv_norm_act(inner, inner, self.stride // 2, groups, **dd),
            nn.Conv2d(inner, dim, 3, padding=1, groups=groups, **dd),
        )
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / stride, W / stride, dim]`, rounded up."""
        x = fill_up(x, (self.stride, self.stride))
        y = self.prm(x)
        y = y + on_nhwc(self.pos_embed, y)
        x = self.attn(self.norm1(y)) + on_nhwc(self.pcm, x)
        return x + self.mlp(self.norm2(x))


class NormalCell(Block):
    """A block with convolutions beside its attention; only this sees a position convolution.

    Args:
        dim: channels.
        attn: the attention.
        groups: of the convolutions.
        drop_path: stochastic depth of every branch.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        groups: int,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, attn, drop_path=drop_path, eps=1e-6, **dd)
        self.pos_embed = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.pcm = nn.Sequential(
            *_conv_norm_act(dim, 4 * dim, 1, groups, **dd),
            *_conv_norm_act(4 * dim, dim, 1, groups, **dd),
            nn.Conv2d(dim, dim, 3, padding=1, groups=groups, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to the same shape."""
        attended = self.attend(x + on_nhwc(self.pos_embed, x))
        x = x + self.drop_path(attended) + self.drop_path(on_nhwc(self.pcm, x))
        return self.feed_forward(x)


def _conv_norm_act(in_dim: int, dim: int, stride: int, groups: int, **dd: Any) -> list[nn.Module]:
    conv = nn.Conv2d(in_dim, dim, 3, stride, 1, groups=groups, **dd)
    return [conv, nn.BatchNorm2d(dim, **dd), nn.SiLU()]


class ViTAEVSA(Pyramid):
    """ViTAEv2* with varied-size windows.

    Maps are filled up to whole cells; the last one must hold a window.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: normal cells per stage, which follow a reduction cell.
        embed_dims: channels of every parallel convolution of the reduction cells, per stage.
        token_dims: channels per stage.
        reduction_heads: attention heads of the reduction cells.
        num_heads: attention heads of the normal cells.
        wide_pcm: whether convolutions in a row have twice the stage's channels in between.
        window_size: side of a window in pixels.
        dense: fill maps up on both sides, and measure the movement of windows along each axis by the other
            one's number of windows, as the official backbones of detectors do.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last cell. The cells of a stage begin in the list that grows
            linearly from 0 where those of the stage before were counted from its beginning, as the authors'
            do: `depths` of (2, 2, 8, 2) have the entries 0-1, 2-3, 2-9 and 8-9.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 64, 128, 256),
        token_dims: Sequence[int] = (64, 128, 256, 512),
        reduction_heads: Sequence[int] = (2, 2, 4, 8),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        wide_pcm: bool = False,
        window_size: int = 7,
        dense: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = drop_path_rates(drop_path_rate, sum(depths))
        windows = Windows(window_size, dense)
        stages = []
        for i, (dim, heads) in enumerate(zip(token_dims, num_heads)):
            before = token_dims[i - 1] if i else in_chans
            down = ReductionCell(before, embed_dims[i], dim, reduction_heads[i], i, wide_pcm, windows, **dd)
            first = depths[i - 1] if i else 0
            cells = [
                NormalCell(dim, windows.attention(dim, heads, dim, **dd), _NORMAL_GROUPS[i], rate, **dd)
                for rate in islice(rates, first, first + depths[i])
            ]
            stages.append(Stage(dim, down, cells))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=nn.Identity(),
            stages=stages,
            norm=nn.Identity(),
            norm_eps=1e-6,
            extra_norms=False,
            min_size=math.prod(_STRIDES) * (window_size - 1) + 1,
            **dd,
        )
        for module in self.modules():
            if isinstance(module, VariedSizeWindowAttention2d):
                # 1x1 convolutions there, which begin as PyTorch draws them.
                module.qkv.reset_parameters()
                module.proj.reset_parameters()


_NAMES = Names(
    ("^layers.#.RC.", "^stages.#.downsample."),
    ("^layers.#.NC.#.", "^stages.#.blocks.#."),
    (".PRM.", ".prm."),
    (".PCM.", ".pcm."),
    (".pos.", ".pos_embed."),
    *CLASSIFIER,
)
# What moves and what stretches the windows: two layers of the authors', one of ours.
_MOVE, _STRETCH, _BOTH = ".sampling_offsets.2.", ".sampling_scales.2.", ".transform.2."
_TABLE = ".relative_position_bias_table"
# Linear layers that the authors write as 1x1 convolutions.
_LINEAR = re.compile(r"\.attn\.(?:qkv|proj)\.weight$")


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(".relative_position_index") or _STRETCH in name:
            continue
        if _MOVE in name:
            parts = value, weights[name.replace(_MOVE, _STRETCH)]
            pairs = [part.unflatten(0, (-1, 2)) for part in parts]
            out[name.replace(_MOVE, _BOTH)] = torch.cat(pairs, 1).flatten(0, 1)
        elif name.endswith(_TABLE) and value.ndim == 2:
            out[name] = bias_table(value)
        else:
            out[name] = value.flatten(1) if value.ndim == 4 and _LINEAR.search(name) else value
    return out


def _to_official(weights: Weights, model: ViTAEVSA) -> dict[str, Tensor]:
    """The authors' names, layers and tables, with the indices that their code stores."""
    out = {}
    for name, value in weights.items():
        if _BOTH in name:
            move, stretch = (t.flatten(0, 1) for t in value.unflatten(0, (-1, 4)).split(2, 1))
            out |= {name.replace(_BOTH, _MOVE): move, name.replace(_BOTH, _STRETCH): stretch}
        elif name.endswith(_TABLE):
            out[name] = stored_table(value)
            side = (value.shape[-1] + 1) // 2
            out[name.replace("_bias_table", "_index")] = window_index((side, side))
        else:
            out[name] = value[..., None, None] if _LINEAR.search(name) else value
    return _NAMES.official_weights(out)


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    depths = ours.lengths("stages", "blocks")
    if len(depths) != len(_STRIDES):
        return None
    cells = [f"stages.{i}.downsample" for i in range(len(depths))]
    token_dims = tuple(ours[f"{cell}.norm2.weight"][0] for cell in cells)
    reduction, normal = (
        [ours[f"stages.{i}.{part}.attn{_TABLE}"] for i in range(len(depths))]
        for part in ("downsample", "blocks.0")
    )
    return {
        "in_chans": ours[f"{cells[0]}.prm.convs.0.0.weight"][1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "embed_dims": tuple(ours[f"{cell}.prm.convs.0.0.weight"][0] for cell in cells),
        "token_dims": token_dims,
        "reduction_heads": tuple(table[0] for table in reduction),
        "num_heads": tuple(table[0] for table in normal),
        "wide_pcm": ours[f"{cells[0]}.pcm.0.weight"][0] == 2 * token_dims[0],
        "window_size": (reduction[0][-1] + 1) // 2,
    }


LAYOUT = Layout(
    family="vsa",
    model_cls=ViTAEVSA,
    marks=(r"^stages\.0\.downsample\.prm\.convs\.", r"\.attn\.relative_position_bias_table$"),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "stages.#.downsample.prm.convs.0.0.weight": 4,
        "stages.#.downsample.pcm.0.weight": 4,
        "stages.#.downsample.norm2.weight": 1,
        f"stages.#.downsample.attn{_TABLE}": 3,
        f"stages.#.blocks.0.attn{_TABLE}": 3,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="state_dict",
    unlearned=("dense",),
)


def _cfg(link: str = "", result: str = "", size: int = 224) -> dict[str, Any]:
    cell = "stages.0.downsample"
    return {
        "url": f"https://api.onedrive.com/v1.0/shares/{link}/root/content" if link else "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "min_input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": (*(f"{cell}.prm.convs.{i}.0" for i in range(len(_DILATIONS[0]))), f"{cell}.pcm.0"),
        "classifier": "head.fc",
        "license": "unknown",
        "paper_ids": "arXiv:2204.08446",
        "paper_name": "VSA: Learning Varied-Size Window Attention in Vision Transformers",
        "origin_url": "https://github.com/ViTAE-Transformer/ViTAE-VSA",
        "notes": (result,) if result else (),
    }


default_cfgs = generate_default_cfgs(
    {
        "vitaev2_vsa_s.in1k": _cfg("s!AimBgYV7JjTlgcgB0Xlyc3U4WO11AQ", "ImageNet-1k top-1 82.7"),
        "vitaev2_vsa_widepcm_s.untrained": _cfg(),
        "vitaev2_vsa_48m.in1k": _cfg("s!AimBgYV7JjTlgcgCOt1UwhNQRfO0bw", "ImageNet-1k top-1 83.9"),
        "vitaev2_vsa_b.untrained": _cfg(result="ImageNet-1k top-1 86.2 after ImageNet-22k"),
        "vitaev2_vsa_b_ws12.untrained": _cfg(size=384),
    }
)

_48M: dict[str, Any] = {
    "depths": (2, 2, 11, 2),
    "embed_dims": (96, 96, 192, 384),
    "token_dims": (96, 192, 384, 768),
    "reduction_heads": (3, 6, 12, 24),
    "num_heads": (3, 6, 12, 24),
    "wide_pcm": True,
}
_B: dict[str, Any] = {
    "depths": (2, 2, 12, 2),
    "embed_dims": (128, 128, 256, 512),
    "token_dims": (128, 256, 512, 1024),
    "reduction_heads": (4, 8, 16, 32),
    "num_heads": (4, 8, 16, 32),
    "wide_pcm": True,
}
VARIANTS = {
    "vitaev2_vsa_s": Variant("ViTAEv2*-S with VSA: 19.8 M parameters, 5.7 GMACs at 224."),
    "vitaev2_vsa_widepcm_s": Variant(
        "ViTAEv2*-S with VSA and wide convolutions in its reduction cells: 20.3 M parameters.",
        reduction_heads=(2, 4, 8, 16),
        wide_pcm=True,
    ),
    "vitaev2_vsa_48m": Variant("ViTAEv2*-48M with VSA: 51.1 M parameters, 15.0 GMACs at 224.", **_48M),
    "vitaev2_vsa_b": Variant("ViTAEv2*-B with VSA: 93.7 M parameters, 27.1 GMACs at 224.", **_B),
    "vitaev2_vsa_b_ws12": Variant(
        "ViTAEv2*-B with VSA and windows of 12 pixels, for 384: 93.8 M parameters.", **_B, window_size=12
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone, name_downloads=True)
