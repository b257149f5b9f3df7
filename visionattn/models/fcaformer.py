"""FcaFormer: convolutional stages, then attention whose keys include tokens handed on from earlier blocks.

Paper: "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer", ICCV 2023,
https://arxiv.org/abs/2211.07198. Official code and weights: https://github.com/hkzhang-git/FcaFormer.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerScale
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from visionattn._compat import inside_feature_getter
from visionattn.kernels.checks import pair
from visionattn.layers.bands import pixelwise
from visionattn.layers.linear import Linear, Mlp
from visionattn.layers.maps import on_nhwc
from visionattn.layers.windows.cross_attention import CrossAttention
from visionattn.models.frames.common import (
    Block,
    Size,
    build_backbone,
    check_fixed_size,
    drop_path_rates,
    factory_arguments,
    init_convolution,
    init_linear,
)
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of, square
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["FcaFormer"]

_HEAD_DIM = 32
# Without windows, so many of the last blocks hand tokens on.
_MOST_BLOCKS = 12


class ConvNorm(nn.Sequential):
    """A convolution without a bias and its batch norm, on `[B, C, H, W]`."""

    def __init__(self, in_dim: int, dim: int, kernel: int = 1, stride: int = 1, groups: int = 1, **dd: Any):
        conv = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2, groups=groups, bias=False, **dd)
        super().__init__(OrderedDict(c=conv, bn=nn.BatchNorm2d(dim, **dd)))


class Downsample(nn.Module):
    """An inverted bottleneck that halves the sides; `[B, H, W, in_dim]` to `[B, H / 2, W / 2, dim]`."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = ConvNorm(in_dim, dim, **dd)
        self.act = nn.GELU()
        self.conv2 = ConvNorm(dim, dim, 3, 2, dim, **dd)
        self.conv3 = ConvNorm(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(x.permute(0, 3, 1, 2)))
        return self.conv3(self.act(self.conv2(x))).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """ConvNeXt's block: a depthwise 7x7 convolution, a norm and an MLP in one residual branch."""

    def __init__(
        self,
        dim: int,
        drop_path: float,
        layer_scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.ls = LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to the same shape."""

        def add_branch(y: Tensor, x: Tensor) -> Tensor:
            return x + self.drop_path(self.ls(self.mlp(self.norm(y))))

        y = on_nhwc(self.dwconv, x)
        # Stochastic depth draws for whole samples, which pieces do not know.
        return pixelwise(add_branch, y, x, into=None if self.training else y, hidden_dim=4 * x.shape[-1])


class FcaBlock(Block):
    """Attention, a convolution that takes the map's place, and an MLP behind two norms.

    Args:
        dim: channels.
        attn: the attention.
        drop_path: stochastic depth of both branches.
        layer_scale: initial factor per channel of both branches.
        hands_on: whether later blocks get tokens.
    """

    def __init__(
        self,
        dim: int,
        attn: CrossAttention,
        drop_path: float,
        layer_scale: float,
        hands_on: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, attn, drop_path=drop_path, layer_scale=layer_scale, **dd)
        self.norm2 = nn.Sequential(nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd))
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim, **dd)
        self.dw_conv = nn.Conv2d(dim, dim, 7, 4, 3, groups=dim, bias=False, **dd) if hands_on else None

    def forward(self, x: Tensor, *cross: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, H, W, C]` and tokens `[B, S, C]` to the map and, unless it is the last block, new tokens."""
        x = x + self.drop_path(self.ls1(self.attend(x, cross)))
        tokens = None if self.dw_conv is None else on_nhwc(self.dw_conv, x).flatten(1, 2)
        return self.feed_forward(on_nhwc(self.local_conv, x)), tokens


class FcaStage(Stage):
    """A stage whose blocks hand tokens on; optionally everything happens inside windows.

    Args:
        dim: channels of the blocks.
        downsample: from the map of the stage before.
        blocks: the blocks.
        window: height and width of a window; None for the whole map. Maps that windows do not divide are
            filled up with zeros, which are pixels like others: on the left and top for every other block,
            the first one included, on the right and bottom for those between.
    """

    def __init__(self, dim: int, downsample: nn.Module, blocks: Sequence[FcaBlock], window: Size | None):
        super().__init__(dim, downsample, blocks)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, dim]`."""
        x = self.downsample(x)
        cross: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            recompute = self.grad_checkpointing and self.training
            run = partial(checkpoint, block) if recompute else block
            if self.window is None:
                x, tokens = run(x, *cross[-_MOST_BLOCKS:])
            else:
                x, tokens = self._in_windows(run, x, cross, at_end=i % 2 == 1)
            if tokens is not None:
                cross.append(tokens)
        return x

    def _in_windows(
        self, run: Any, x: Tensor, cross: Sequence[Tensor], at_end: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert self.window is not None
        (height, width), (rows, columns) = x.shape[1:3], self.window
        bottom, right = -height % rows, -width % columns
        padding = (0, 0, 0, right, 0, bottom) if at_end else (0, 0, right, 0, bottom, 0)
        x = F.pad(x, padding).unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        y, tokens = run(x.flatten(0, 2), *cross)
        y = y.view_as(x).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        top, left = (0, 0) if at_end else (bottom, right)
        return y[:, top : top + height, left : left + width], tokens


class NormedHead(ClassifierHead):
    """Pooling, a norm and a classifier; without a pooling the features stay as they are."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any):
        super().__init__(dim, num_classes, global_pool, drop_rate, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if global_pool else nn.Identity()

    def reset(self, num_classes: int, pool_type: str | None = None, **kwargs: Any) -> None:
        """A new classifier, optionally with another pooling."""
        dd = factory_arguments(self)
        super().reset(num_classes, pool_type, **kwargs)
        if not self.global_pool.pool_type:
            self.norm = nn.Identity()
        elif isinstance(self.norm, nn.Identity):
            self.norm = nn.LayerNorm(self.num_features, **dd)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`[B, C, H, W]` to logits `[B, num_classes]`, or to normalised features `[B, C]`."""
        x = self.drop(self.norm(self.global_pool(x)))
        return x if pre_logits else self.fc(x)


class FcaFormer(Pyramid):
    """FcaFormer. Classification networks take images of their training size.

    Dense ones have windows of the size that the last two maps have in training (14 and 7 pixels), and take
    images of any size.

    Args:
        img_size: training size in pixels, or (height, width), multiples of 32.
        windowed: attention inside windows, as the official dense backbones have it.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dims: channels per stage.
        depths: blocks per stage.
        layer_scale: initial factor per channel of the residual branches; 1 in official dense training.
        extra_norms: a linear layer to `out_dims` and a LayerNorm per returned stage output, as the official
            dense backbones have.
        out_dims: channels of these outputs.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: a training size that 32 does not divide, or widths of stages with attention that heads of
            32 channels do not.
    """

    undecayed = ()  # the authors' training decays the biases too

    def __init__(
        self,
        img_size: int | Size = 224,
        windowed: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 192, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        layer_scale: float = 1e-6,
        extra_norms: bool = False,
        out_dims: Sequence[int] = (96, 192, 384, 768),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size = pair("img_size", img_size)
        if size[0] % 32 or size[1] % 32:
            raise ValueError(f"img_size must be a multiple of 32, got {img_size}")
        if any(dim % _HEAD_DIM for dim in embed_dims[2:]):
            raise ValueError(f"embed_dims[2:] must be multiples of {_HEAD_DIM}, got {tuple(embed_dims)}")
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            down = Downsample(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
            if i < 2:
                stages.append(
                    Stage(dim, down, [ConvBlock(dim, next(rates), layer_scale, **dd) for _ in range(depth)])
                )
                continue
            map_size = (size[0] // (4 * 2**i), size[1] // (4 * 2**i))
            most = depth if windowed else _MOST_BLOCKS
            blocks = [
                FcaBlock(
                    dim,
                    CrossAttention(
                        dim, dim // _HEAD_DIM, map_size, min(j, most) * _tokens_of(map_size), **dd
                    ),
                    next(rates),
                    layer_scale,
                    hands_on=j < depth - 1,
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(FcaStage(dim, down, blocks, map_size if windowed else None))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=MapSequential(
                ConvNorm(in_chans, embed_dims[0] // 2, 3, 2, **dd),
                nn.GELU(),
                ConvNorm(embed_dims[0] // 2, embed_dims[0], 3, 2, **dd),
            ),
            stages=stages,
            norm=nn.Identity(),
            norm_eps=1e-6,
            extra_norms=False,
            min_size=1 if windowed else min(size),
            **dd,
        )
        self.img_size, self.windowed = size, windowed
        self.head = NormedHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        if extra_norms:
            self.extra_norms = nn.ModuleList(
                nn.Sequential(Linear(dim, out, bias=False, **dd), nn.LayerNorm(out, eps=1e-6, **dd))
                for dim, out in zip(embed_dims, out_dims)
            )
            self.feature_info = [{**info, "num_chs": dim} for info, dim in zip(self.feature_info, out_dims)]
        self.apply(init_linear)
        self.apply(init_convolution)

    def embed(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the first map `[B, H / 4, W / 4, C]`.

        Raises:
            ValueError: without windows, an image of another size than the training size.
        """
        if not self.windowed:
            check_fixed_size(x, self.img_size)
        return super().embed(x)


def _tokens_of(size: Size) -> int:
    """How many tokens a block hands on: every fourth pixel along rows and columns."""
    return math.ceil(size[0] / 4) * math.ceil(size[1] / 4)


_IN_ATTENTION = ("s_token_bias$", "s_scale_factors$", "attention_biases$", "s_norm.", "qkv.", "proj.")
_NAMES = Names(
    ("^patch_embed.seq.", "^stem."),
    *((f"^layer_{i}.downsample.", f"^stages.{i + 1}.downsample.") for i in range(8)),
    ("^layer_#.blocks.", "^stages.#.blocks."),
    *((f"^stages.#.blocks.#.{part}", f"^stages.#.blocks.#.attn.{part}") for part in _IN_ATTENTION),
    (".gamma_#$", ".ls#.gamma$"),
    ("^stages.#.blocks.#.gamma$", "^stages.#.blocks.#.ls.gamma$"),
    (".pwconv#.", ".mlp.fc#."),
    (".norm2.weight$", ".norm2.0.weight$"),
    (".norm2.bias$", ".norm2.0.bias$"),
    (".mlp.norm.", ".norm2.1."),
    ("^norm_head.", "^head.norm."),
    ("^head#.", "^extra_norms.#.0."),
    ("^norm#.", "^extra_norms.#.1."),
    *CLASSIFIER,
)
# Linear layers that the authors write as 1x1 convolutions.
_LINEAR = re.compile(r"^extra_norms\.\d+\.0\.weight$")


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.flatten(1) if v.ndim == 4 and _LINEAR.search(n) else v for n, v in weights.items()}


def _to_official(weights: Weights, model: FcaFormer) -> dict[str, Tensor]:
    """The authors' names and 1x1 convolutions; the MLPs beside attention keep theirs."""
    out = {}
    for name, value in weights.items():
        official = _NAMES.to_official(name)
        if f"{name.partition('.mlp.')[0]}.attn.qkv.weight" in weights:
            official = official.replace(".pwconv", ".mlp.fc")
        out[official] = value[..., None, None] if _LINEAR.search(name) else value
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    depths = ours.lengths("stages", "blocks")
    size = _map_size(ours)
    if len(depths) != 4 or size is None:
        return None
    out: dict[str, Any] = {
        "img_size": square(16 * size[0], 16 * size[1]),
        "in_chans": ours["stem.0.c.weight"][1],
        "num_classes": classes_of(ours),
        "embed_dims": tuple(ours[f"stages.{i}.blocks.0.mlp.fc2.weight"][0] for i in range(4)),
        "depths": depths,
        "extra_norms": "extra_norms.0.0.weight" in ours,
    }
    projections = [ours.get(f"extra_norms.{i}.0.weight", 2) for i in range(4)]
    if all(projections):
        # Only dense backbones have them.
        out |= {"out_dims": tuple(shape[0] for shape in projections if shape), "windowed": True}
    return out


def _map_size(ours: Shapes) -> Size | None:
    """The size of the third stage's map, both sides even: the squarest that biases and tokens allow."""
    pixels = ours["stages.2.blocks.0.attn.attention_biases"][1]
    tokens = ours.get("stages.2.blocks.1.attn.s_token_bias", 4)
    for rows in range(math.isqrt(pixels), 0, -1):
        size = (rows, pixels // rows)
        even = rows * size[1] == pixels and not (size[0] % 2 or size[1] % 2)
        if even and (tokens is None or tokens[-1] == _tokens_of(size)):
            return size
    return None


LAYOUT = Layout(
    family="fcaformer",
    model_cls=FcaFormer,
    marks=(r"\.attn\.attention_biases$", r"\.local_conv\.c\.weight$"),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "stem.0.c.weight": 4,
        "stages.#.blocks.0.mlp.fc2.weight": 2,
        "stages.2.blocks.0.attn.attention_biases": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="model",
    unlearned=("windowed",),
)


def _cfg(top1: float) -> dict[str, Any]:
    return {
        # The one file that the authors share, of L2, lies where a browser and a code are needed.
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0.c",
        "classifier": "head.fc",
        "license": "unknown",
        "paper_ids": "arXiv:2211.07198",
        "paper_name": "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
        "origin_url": "https://github.com/hkzhang-git/FcaFormer",
        "notes": (f"ImageNet-1k top-1 {top1}",),
    }


default_cfgs = generate_default_cfgs(
    {
        "fcaformer_l1.in1k": _cfg(80.3),
        "fcaformer_l2.in1k": _cfg(83.1),
        "fcaformer_l3.in1k": _cfg(84.2),
        "fcaformer_l4.in1k": _cfg(84.9),
    }
)


def _build(*args: Any, windowed: bool = False, **kwargs: Any) -> Any:
    network = build_backbone(*args, windowed=windowed, **kwargs)
    if windowed:
        for one in (network, inside_feature_getter(network)[0]):
            one.pretrained_cfg["fixed_input_size"] = False
    return network


VARIANTS = {
    "fcaformer_l1": Variant("FcaFormer-L1: 6.2 M parameters, 1.4 GMACs at 224."),
    "fcaformer_l2": Variant(
        "FcaFormer-L2: 16.3 M parameters, 3.6 GMACs at 224.",
        embed_dims=(96, 192, 320, 480),
        depths=(2, 2, 7, 2),
    ),
    "fcaformer_l3": Variant(
        "FcaFormer-L3: 27.9 M parameters, 6.7 GMACs at 224.",
        embed_dims=(96, 192, 320, 512),
        depths=(3, 6, 12, 3),
    ),
    "fcaformer_l4": Variant(
        "FcaFormer-L4: 65.6 M parameters, 14.5 GMACs at 224.",
        embed_dims=(128, 256, 512, 768),
        depths=(3, 6, 12, 3),
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=_build)
