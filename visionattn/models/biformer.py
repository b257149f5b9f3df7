"""BiFormer: a vision transformer whose tokens attend to a few routed regions.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
https://arxiv.org/abs/2303.08810. Official code and weights: https://github.com/rayleizhu/BiFormer (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels import dense_attention
from visionattn.layers import BiLevelRoutingAttention
from visionattn.layers.linear import Linear
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import Block, build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["BiFormer"]


class FullAttention(nn.Module):
    """Attention among all pixels, with the local enhancement of the last stage.

    Args:
        dim: channels.
        num_heads: attention heads.
        side_dwconv: kernel size of the depthwise convolution.
        lepe_of_values: whether that convolution sees the values (the NCHW operator) or the input.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        side_dwconv: int = 5,
        lepe_of_values: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.lepe_of_values = lepe_of_values
        self.qkv = Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        qkv = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        out = dense_attention(q, k, v).flatten(3)
        local = on_nhwc(self.lepe, qkv.chunk(3, -1)[2] if self.lepe_of_values else x)
        return self.proj(out + local)


class BiFormer(Pyramid):
    """BiFormer, all official forms.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: blocks per stage.
        embed_dims: channels per stage.
        mlp_ratios: hidden width of the MLP per stage, as a multiple of its channels.
        n_win: regions per side; 7 for classification, 8 for ADE20K crops of 512, 16 for COCO.
        topks: regions that each region attends to, per stage; -2 is full attention.
        head_dim: width of a head in routed stages; full attention has 8 heads.
        side_dwconv: kernel size of the local enhancement of the attention.
        before_attn_dwconv: kernel size of the position convolution of each block, 0 for none.
        patch_conv: whether maps are downsampled by disjoint patches (4x4, then 2x2: the STL form) instead of
            overlapping 3x3 convolutions.
        operator: the attention operator: `"nhwc"` or `"nchw"`, which differ in padding and in the last stage.
        auto_pad: False refuses maps that `n_win` does not divide; True fills them up.
        extra_norms: a LayerNorm per returned stage output, as the official dense backbones have.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        n_win: int = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        head_dim: int = 32,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        patch_conv: bool = False,
        operator: Literal["nhwc", "nchw"] = "nhwc",
        auto_pad: bool = True,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        routing: dict[str, Any] = {"n_win": n_win, "auto_pad": auto_pad, "side_dwconv": side_dwconv}
        routing["pad"] = "input" if operator == "nhwc" else "projected"
        stages = []
        for i, dim in enumerate(embed_dims):
            blocks = []
            for _ in range(depths[i]):
                if topks[i] == -2:
                    attn = FullAttention(dim, 8, side_dwconv, lepe_of_values=operator == "nchw", **dd)
                else:
                    attn = BiLevelRoutingAttention(dim, dim // head_dim, topk=topks[i], **routing, **dd)
                blocks.append(
                    Block(
                        dim,
                        attn,
                        mlp_ratios[i],
                        next(rates),
                        eps=1e-6,
                        pos_kernel=before_attn_dwconv,
                        **dd,
                    )
                )
            down = _downsample(embed_dims[i - 1], dim, patch_conv, dd) if i else nn.Identity()
            stages.append(Stage(dim, down, blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=_stem(in_chans, embed_dims[0], patch_conv, dd),
            stages=stages,
            norm=nn.BatchNorm2d(embed_dims[-1], **dd),
            norm_eps=1e-6,
            extra_norms=extra_norms,
            min_size=_min_size(patch_conv, operator, n_win, topks),
            **dd,
        )

    def final_norm(self, x: Tensor) -> Tensor:
        """The batch norm of the last map `[B, H, W, C]`."""
        return on_nhwc(self.norm, x)


def _min_size(patch_conv: bool, operator: str, n_win: int, topks: Sequence[int]) -> int:
    """The smallest input side: overlapping convolutions round up, patches round down, and the NCHW operator
    needs a pixel per region in every routed stage."""
    total = 4 * 2 ** (len(topks) - 1)
    routed = max((4 * 2**i for i, topk in enumerate(topks) if topk != -2), default=0)
    patches = total if patch_conv else 1
    if operator == "nhwc":
        return patches
    return max(patches, n_win * routed if patch_conv else (n_win - 1) * routed + 1)


def _stem(in_chans: int, dim: int, patch_conv: bool, dd: dict[str, Any]) -> MapSequential:
    if patch_conv:
        return MapSequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))
    return MapSequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def _downsample(in_dim: int, dim: int, patch_conv: bool, dd: dict[str, Any]) -> MapSequential:
    if patch_conv:
        return MapSequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, **dd))
    return MapSequential(nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(dim, **dd))


# The official files differ by form: blocks are numbered with or without `blocks`, the MLP's second layer is 2
# or 3, and routed attention has names of its own, the NCHW operator others.
_RULES = (
    ("^downsample_layers.0.", "^stem."),
    ("^downsample_layers.#.", "^stages.#.downsample."),
    (".mlp.0.", ".mlp.fc1."),
    *CLASSIFIER,
)
_OVERLAPPING = Names(*_RULES, ("^stages.#.#.", "^stages.#.blocks.#."), (".mlp.3.", ".mlp.fc2."))
_PATCHES = Names(*_RULES, (".mlp.2.", ".mlp.fc2."))
_ROUTED = {
    "nhwc": Names((".attn.qkv.qkv.", ".attn.qkv."), (".attn.wo.", ".attn.proj.")),
    "nchw": Names((".attn.qkv_linear.", ".attn.qkv."), (".attn.output_linear.", ".attn.proj.")),
}
_LINEAR = re.compile(r"\.(?:qkv|proj|fc1|fc2)\.weight$")


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 1x1 convolutions of the NCHW operator become linear layers."""
    return {n: v.flatten(1) if v.ndim == 4 and _LINEAR.search(n) else v for n, v in weights.items()}


def _to_official(weights: Weights, model: BiFormer) -> dict[str, Tensor]:
    """Our weights in the authors' names."""
    names = _PATCHES if weights["stem.0.weight"].shape[-1] == 4 else _OVERLAPPING
    full = [m for m in model.modules() if isinstance(m, FullAttention)]
    operator = "nchw" if full and full[0].lepe_of_values else "nhwc"
    out = {}
    for name, value in weights.items():
        # Only routed attention has a bias of the queries, keys and values.
        routed = f"{name.partition('.attn.')[0]}.attn.qkv.bias" in weights
        value = value[..., None, None] if operator == "nchw" and _LINEAR.search(name) else value
        out[names.to_official(_ROUTED[operator].to_official(name) if routed else name)] = value
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    depths = ours.lengths("stages", "blocks")
    dims = [ours[f"stages.{i}.blocks.0.norm1.weight"][0] for i in range(len(depths))]
    stem, lepe = ours["stem.0.weight"], ours["stages.0.blocks.0.attn.lepe.weight"]
    position = ours.get("stages.0.blocks.0.pos_embed.weight", 4)
    out: dict[str, Any] = {
        "in_chans": stem[1],
        "num_classes": classes_of(ours),
        "depths": depths,
        "embed_dims": tuple(dims),
        "mlp_ratios": tuple(
            ours[f"stages.{i}.blocks.0.mlp.fc1.weight"][0] / dim for i, dim in enumerate(dims)
        ),
        "side_dwconv": lepe[-1],
        "before_attn_dwconv": position[-1] if position else 0,
        "patch_conv": stem[-1] == 4,
        "extra_norms": "extra_norms.0.weight" in ours,
    }
    routed = [f"stages.{i}.blocks.0.attn.qkv.bias" in ours for i in range(len(depths))]
    if routed != [True] * (len(depths) - 1) + [False]:
        return None  # full attention in another than the last stage
    if any(".qkv_linear." in name for name in official.names):
        out["operator"] = "nchw"
    elif any(".qkv.qkv." in name for name in official.names):
        out["operator"] = "nhwc"
    return out


LAYOUT = Layout(
    family="biformer",
    model_cls=BiFormer,
    marks=(r"^stages\.0\.blocks\.0\.attn\.lepe\.weight$", r"^stem\.1\.running_mean$"),
    rename=(_OVERLAPPING + _PATCHES + _ROUTED["nhwc"] + _ROUTED["nchw"]).to_ours,
    convert=_convert,
    reads={
        "stem.0.weight": 4,
        "stages.0.blocks.0.attn.lepe.weight": 4,
        "stages.#.blocks.0.norm1.weight": 1,
        "stages.#.blocks.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    wrapper="model",
    unlearned=("n_win", "topks", "head_dim", "operator", "auto_pad"),
)


def _cfg(url: str = "", top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2303.08810",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        "notes": (f"ImageNet-1k top-1 {top1}",),
        **kwargs,
    }


def _share(file: str) -> str:
    return f"https://api.onedrive.com/v1.0/shares/s!AkBbczdRlZvCh{file}/root/content"


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _cfg(_share("HEOoGkgwgQzEDlM"), 81.4),
        "biformer_small.in1k": _cfg(_share("HDyM-x9KWRBZ832"), 83.8),
        "biformer_base.in1k": _cfg(_share("HI_XPhoadjaNxtO"), 84.3),
        "biformer_stl.in1k": _cfg(_share("Sf-m7ujkvx9lIQ1"), 82.7, min_input_size=(3, 32, 32)),
        "biformer_stl_nchw.in1k": _cfg(_share("WYrKbWbMgqd2Ai0"), 82.7, min_input_size=(3, 112, 112)),
    }
)


_STL: dict[str, Any] = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (96, 192, 384, 768),
    "mlp_ratios": (4, 4, 4, 4),
    "before_attn_dwconv": 0,
    "patch_conv": True,
}

VARIANTS = {
    "biformer_tiny": Variant(
        "BiFormer-T: 13.1 M parameters, 2.2 GMACs at 224.",
        depths=(2, 2, 8, 2),
        embed_dims=(64, 128, 256, 512),
    ),
    "biformer_small": Variant(
        "BiFormer-S: 25.5 M parameters, 4.5 GMACs at 224.",
        depths=(4, 4, 18, 4),
        embed_dims=(64, 128, 256, 512),
    ),
    "biformer_base": Variant(
        "BiFormer-B: 56.8 M parameters, 9.8 GMACs at 224.",
        depths=(4, 4, 18, 4),
        embed_dims=(96, 192, 384, 768),
    ),
    "biformer_stl": Variant(
        "BiFormer-STL, the layout of Swin-T: 28.4 M parameters, 4.6 GMACs at 224.", **_STL
    ),
    "biformer_stl_nchw": Variant(
        "BiFormer-STL with the NCHW operator: 28.4 M parameters, 4.6 GMACs at 224.", **_STL, operator="nchw"
    ),
}
# All shared files are called "content".
register(__name__, LAYOUT, VARIANTS, builder=build_backbone, name_downloads=True)
