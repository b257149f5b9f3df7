"""L2ViT: local window attention and global linear attention in turn.

Paper: "The Linear Attention Resurrection in Vision Transformer", https://arxiv.org/abs/2501.16182. Official
code and weights: https://github.com/ChuanyangZheng/L2ViT (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers import LinearAttention2d, WindowAttention2d
from visionattn.layers.maps import fill_up, on_nhwc
from visionattn.models.frames.common import (
    Block,
    StridedConv2d,
    build_backbone,
    drop_path_rates,
    init_convolution,
)
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, register

__all__ = ["L2ViT"]


class Stem(nn.Module):
    """Images to a map of a quarter of their size: two convolutions, a norm; `[B, H, W, C]` in and out."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = MapSequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(fill_up(x, (4, 4))))


class Downsample(nn.Module):
    """A norm and a convolution of disjoint 2x2 patches; odd maps are filled up after the norm."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(in_dim, **dd)
        self.proj = StridedConv2d(in_dim, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return on_nhwc(self.proj, fill_up(self.norm(x), (2, 2)))


class LocalConcentration(nn.Module):
    """Two depthwise 7x7 convolutions that gather what linear attention spreads; `[B, H, W, C]` in and out."""

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.act(self.conv1(x.permute(0, 3, 1, 2))))
        return self.conv2(x).permute(0, 2, 3, 1)


class L2Block(Block):
    """A block between convolutional position encodings, with a local or a global attention.

    A local block has a second position encoding before the MLP; a global one the local concentration instead.

    Args:
        dim: channels.
        attn: the attention.
        is_global: which of the two forms.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        drop_path: stochastic depth of every branch.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        is_global: bool,
        mlp_ratio: float,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, attn, mlp_ratio, drop_path, **dd)
        self.cpe = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) for _ in range(1 if is_global else 2)
        )
        self.norm3 = nn.LayerNorm(dim, **dd) if is_global else None
        self.local_mp = LocalConcentration(dim, **dd) if is_global else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = x + on_nhwc(self.cpe[0], x)
        x = x + self.drop_path(self.attend(x))
        if self.norm3 is None or self.local_mp is None:
            x = x + on_nhwc(self.cpe[1], x)
        else:
            x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return self.feed_forward(x)


class L2ViT(Pyramid):
    """L2ViT. Images are filled up with zeros to multiples of 4, maps to even sizes and to whole windows.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: blocks per stage: local, global, local, ...
        embed_dims: channels per stage.
        num_heads: attention heads per stage.
        mlp_ratio: hidden width of the MLPs as a multiple of the channels.
        window_size: side of a window in pixels; no weight depends on it.
        extra_norms: a LayerNorm per returned stage output, as the official dense backbones have.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads)):
            blocks = []
            for j in range(depths[i]):
                if j % 2:
                    attn = LinearAttention2d(dim, heads, **dd)
                else:
                    attn = WindowAttention2d(dim, heads, window_size, relative_bias=False, **dd)
                blocks.append(L2Block(dim, attn, bool(j % 2), mlp_ratio, next(rates), **dd))
            down = Downsample(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(dim, down, blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=Stem(in_chans, embed_dims[0], **dd),
            stages=stages,
            norm=nn.LayerNorm(embed_dims[-1], **dd),
            norm_eps=1e-5,
            extra_norms=extra_norms,
            min_size=1,
            **dd,
        )
        self.apply(init_convolution)


_NAMES = Names(
    ("^downsample_layers.0.", "^stem."),
    ("^stem.proj.proj.", "^stem.proj."),
    ("^downsample_layers.#.", "^stages.#.downsample."),
    ("^stages.#.#.", "^stages.#.blocks.#."),
    (".cpe.#.proj.", ".cpe.#."),
    ("^norm#.", "^extra_norms.#."),
    *CLASSIFIER,
)


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    depths = ours.lengths("stages", "blocks")
    dims = tuple(ours[f"stages.{i}.blocks.0.norm1.weight"][0] for i in range(len(depths)))
    return {
        "in_chans": ours["stem.proj.0.weight"][1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "embed_dims": dims,
        "num_heads": tuple(ours[f"stages.{i}.blocks.1.attn.temperature"][0] for i in range(len(depths))),
        "mlp_ratio": ours["stages.0.blocks.0.mlp.fc1.weight"][0] / dims[0],
        "extra_norms": "extra_norms.0.weight" in ours,
    }


LAYOUT = Layout(
    family="l2vit",
    model_cls=L2ViT,
    marks=(r"\.local_mp\.bn\.", r"\.attn\.temperature$"),
    rename=_NAMES.to_ours,
    reads={
        "stem.proj.0.weight": 4,
        "stages.#.blocks.0.norm1.weight": 1,
        "stages.#.blocks.1.attn.temperature": 3,
        "stages.0.blocks.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_NAMES.official_weights,
    wrapper="model",
    unlearned=("window_size",),
)


def _cfg(file: str, top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/L2ViT-{file}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2501.16182",
        "paper_name": "The Linear Attention Resurrection in Vision Transformer",
        "origin_url": "https://github.com/ChuanyangZheng/L2ViT",
        "notes": () if top1 is None else (f"ImageNet-1k top-1 {top1}",),
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
        "l2vit_t.in1k": _cfg("Tiny-checkpoint-best-ema", 83.1),
        "l2vit_s.in1k": _cfg("Small-checkpoint-best-ema", 84.1),
        "l2vit_b.in1k": _cfg("Base-checkpoint-best-ema", 84.4),
        "l2vit_b.in22k_ft_in1k": _cfg("Base-22k21k-finetune-224-checkpoint-best", 86.0),
        "l2vit_b.in22k": _cfg("Base-22k-pretrain-checkpoint-best", num_classes=21841),
        "l2vit_b_384.in22k_ft_in1k": _cfg("Base-22k21k-finetune-384-checkpoint-best", 87.0, **_AT_384),
    }
)


_BASE: dict[str, Any] = {
    "depths": (2, 2, 18, 2),
    "embed_dims": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
}

VARIANTS = {
    "l2vit_t": Variant("L2ViT-T: 28.6 M parameters, 4.7 GMACs at 224."),
    "l2vit_s": Variant("L2ViT-S: 50.2 M parameters, 9.0 GMACs at 224.", depths=(2, 2, 18, 2)),
    "l2vit_b": Variant("L2ViT-B: 88.6 M parameters, 15.9 GMACs at 224.", **_BASE),
    "l2vit_b_384": Variant(
        "L2ViT-B with windows of 12 pixels, for 384: 88.6 M parameters, 47.5 GMACs.", **_BASE, window_size=12
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
