"""EfficientMod: features times a context of 7x7 pixels, then a few blocks of attention.

Paper: "Efficient Modulation for Vision Networks", ICLR 2024, https://arxiv.org/abs/2403.19963. Official code
and weights: https://github.com/ma-xu/EfficientMod (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels import dense_attention
from visionattn.layers.linear import Linear, activated, is_disposable, overwritten
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import Block, build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import PatchEmbedding, Pyramid, Stage
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, register

__all__ = ["EfficientMod"]


class ModulationMlp(nn.Module):
    """An MLP whose hidden features are multiplied by a context from the neighbourhood (section 3.2).

    Args:
        dim: channels.
        ratio: hidden width as a multiple of `dim`; hidden channel i meets context channel i modulo `dim`.
            With 1 the hidden features have no activation.
        kernel_size: side of the context's convolution, odd.
    """

    def __init__(
        self,
        dim: int,
        ratio: int,
        kernel_size: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ratio = ratio
        self.context_in = Linear(dim, dim, **dd)
        self.context_conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.context_act = nn.GELU()
        self.context_out = Linear(dim, dim, **dd)
        self.fc1 = Linear(dim, ratio * dim, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(ratio * dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        context = on_nhwc(self.context_conv, self.context_in(x))
        context = overwritten(self.context_act, context, self.context_conv)
        context = self.context_out(context).unsqueeze(-2)
        x = activated(self.fc1, self.act, x) if self.ratio > 1 else self.fc1(x)
        x = x.unflatten(-1, (self.ratio, -1))
        # Inference needs the hidden features no more.
        x = x.mul_(context) if is_disposable(self.fc1, self.act) else x * context
        return self.fc2(x.flatten(-2))


class ModulationBlock(nn.Module):
    """One residual branch: a norm and the modulation.

    Args:
        dim: channels.
        ratio: hidden width as a multiple of `dim`.
        drop_path: stochastic depth.
        layer_scale: initial factor per channel.
    """

    def __init__(
        self,
        dim: int,
        ratio: int,
        drop_path: float = 0.0,
        layer_scale: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = ModulationMlp(dim, ratio, **dd)
        self.ls = LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        return x + self.drop_path(self.ls(self.mlp(self.norm(x))))


class Attention(nn.Module):
    """Attention among all pixels; the channels of its heads are not those of the map.

    Args:
        dim: channels.
        num_heads: attention heads; each is `dim // num_heads` wide, or 32 where that is less.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        inner_dim = num_heads * max(dim // num_heads, 32)
        self.qkv = Linear(dim, 3 * inner_dim, bias=False, **dd)
        self.proj = Linear(inner_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        return self.proj(dense_attention(q, k, v).flatten(3))


class EfficientMod(Pyramid):
    """EfficientMod. It has no position embedding and rounds maps up; images may have any size.

    The official dense backbones are the same network: they give the stages' maps without a norm.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: modulation blocks per stage.
        attention_depths: attention blocks per stage, which follow.
        embed_dims: channels per stage.
        ratios: hidden widths of modulation blocks as multiples of the channels, repeated in every stage.
        num_heads: attention heads.
        mlp_ratios: hidden width of the attention blocks' MLPs per stage, as a multiple of the channels.
        layer_scale: initial factor per channel of the modulation.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (4, 4, 8, 4),
        attention_depths: Sequence[int] = (0, 0, 4, 4),
        embed_dims: Sequence[int] = (32, 64, 144, 312),
        ratios: Sequence[int] = (1, 6),
        num_heads: int = 8,
        mlp_ratios: Sequence[float] = (4, 4, 4, 5),
        layer_scale: float = 1e-4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths) + sum(attention_depths)))
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks: list[nn.Module] = [
                ModulationBlock(dim, ratios[j % len(ratios)], next(rates), layer_scale, **dd)
                for j in range(depths[i])
            ]
            blocks += [
                Block(dim, Attention(dim, num_heads, **dd), mlp_ratios[i], next(rates), **dd)
                for _ in range(attention_depths[i])
            ]
            down = PatchEmbedding(embed_dims[i - 1], dim, 3, 2, padding=1, **dd) if i else nn.Identity()
            stages.append(Stage(dim, down, blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=PatchEmbedding(in_chans, embed_dims[0], 7, 4, padding=3, **dd),
            stages=stages,
            norm=nn.LayerNorm(embed_dims[-1], **dd),
            norm_eps=1e-5,
            extra_norms=False,
            min_size=1,
            **dd,
        )


# The official networks have a stage's downsampling at the end of the stage before.
_NAMES = Names(
    ("^patch_embed.", "^stem."),
    *((f"^layers.{i}.downsample.", f"^stages.{i + 1}.downsample.") for i in range(8)),
    ("^layers.#.blocks.", "^stages.#.blocks."),
    (".gamma_1$", ".ls.gamma$"),
    (".mlp.context_layer.f.", ".mlp.context_in."),
    (".mlp.context_layer.context_list.0.", ".mlp.context_conv."),
    (".mlp.context_layer.g.", ".mlp.context_out."),
    *CLASSIFIER,
)


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    lengths = ours.lengths("stages", "blocks")
    # Attention blocks follow the others.
    depths = tuple(
        sum(f"stages.{i}.blocks.{j}.ls.gamma" in ours for j in range(length))
        for i, length in enumerate(lengths)
    )
    dims = tuple(ours[f"stages.{i}.blocks.0.norm.weight"][0] for i in range(len(lengths)))
    hidden = [
        [ours.get(f"stages.{i}.blocks.{j}.mlp.fc1.weight", 2) for j in range(length)]
        for i, length in enumerate(lengths)
    ]
    if not all(all(stage) for stage in hidden):
        return None
    widths = [[shape[0] for shape in stage if shape] for stage in hidden]
    longest = max(range(len(depths)), key=lambda i: depths[i])
    ratios = [width // dims[longest] for width in widths[longest][: depths[longest]]]
    repeats = [all(r == ratios[j % n] for j, r in enumerate(ratios)) for n in range(1, len(ratios) + 1)]
    out: dict[str, Any] = {
        "in_chans": ours["stem.proj.weight"][1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "attention_depths": tuple(length - depth for length, depth in zip(lengths, depths)),
        "embed_dims": dims,
        "ratios": tuple(ratios[: repeats.index(True) + 1]),
    }
    attended = [i for i, (length, depth) in enumerate(zip(lengths, depths)) if length > depth]
    if attended:
        mlp = {i: widths[i][-1] / dims[i] for i in attended}
        out["mlp_ratios"] = tuple(mlp.get(i, 4) for i in range(len(dims)))
    return out


LAYOUT = Layout(
    family="efficientmod",
    model_cls=EfficientMod,
    marks=(r"^stages\.0\.blocks\.0\.mlp\.context_in\.weight$", r"^stages\.\d+\.blocks\.0\.ls\.gamma$"),
    rename=_NAMES.to_ours,
    reads={"stem.proj.weight": 4, "stages.#.blocks.0.norm.weight": 1},
    arguments=_arguments,
    to_official=_NAMES.official_weights,
    wrapper="state_dict",
    unlearned=("num_heads",),
)


def _cfg(folder: str, top1: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "description": f"weights: https://drive.google.com/drive/folders/{folder}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2403.19963",
        "paper_name": "Efficient Modulation for Vision Networks",
        "origin_url": "https://github.com/ma-xu/EfficientMod",
        "notes": (f"ImageNet-1k top-1 {top1}",),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "efficientmod_xxs": _cfg("1c0dlnN7w1bHlAsKcJFhGVA2mIhoA6ZHz", "77.1"),
        "efficientmod_xs": _cfg("1PPQFO891WfJRUiH58NlWOgHDEzDnwC0_", "79.4"),
        "efficientmod_s": _cfg("1rJs8LcWmdTFmj-IJ0cmlVp_MxGfZFsFk", "81.9"),
        "efficientmod_s_conv": _cfg("1EY637XRiDPL4AwrVGESJWsK-ZP2GhnaI", "80.5, without a teacher"),
    }
)

VARIANTS = {
    "efficientmod_xxs": Variant(
        "EfficientMod-xxs: 4.7 M parameters, 0.6 GMACs at 224.",
        depths=(2, 2, 6, 2),
        attention_depths=(0, 0, 1, 2),
        embed_dims=(32, 64, 128, 256),
        mlp_ratios=(4, 4, 4, 4),
    ),
    "efficientmod_xs": Variant(
        "EfficientMod-xs: 6.6 M parameters, 0.8 GMACs at 224.",
        depths=(3, 3, 4, 2),
        attention_depths=(0, 0, 3, 3),
        embed_dims=(32, 64, 144, 288),
        ratios=(1, 4),
        mlp_ratios=(4, 4, 4, 4),
    ),
    "efficientmod_s": Variant("EfficientMod-s: 12.9 M parameters, 1.4 GMACs at 224."),
    "efficientmod_s_conv": Variant(
        "EfficientMod-s-Conv, without attention: 12.9 M parameters, 1.5 GMACs at 224.",
        depths=(4, 4, 12, 8),
        attention_depths=(0, 0, 0, 0),
        embed_dims=(40, 80, 160, 344),
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
