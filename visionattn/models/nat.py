"""NAT and DiNAT: hierarchical transformers with (dilated) neighborhood attention, and their isotropic forms.

Papers: "Neighborhood Attention Transformer", CVPR 2023, https://arxiv.org/abs/2204.07143; "Dilated
Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001. Official code and weights:
https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers import NeighborhoodAttention2d
from visionattn.layers.maps import fill_up, on_nhwc
from visionattn.models.frames.common import Block, build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import PatchMerging, Pyramid, Stage
from visionattn.models.hosts.swin_buffers import window_index
from visionattn.models.registry.names import CLASSIFIER, Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["NAT", "TASK_DILATIONS"]

# Dilations per stage of the official dense-prediction backbones; their weights do not depend on them.
TASK_DILATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "coco": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "ade20k": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "ade20k_640": (
        (1, 20),
        (1, 5, 1, 10),
        (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
        (1, 2),
    ),
    "mask2former": (
        (1, 14),
        (1, 4, 1, 7),
        (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3),
        (1,),
    ),
}


class ConvDownsample(nn.Module):
    """Overlapping 3x3 convolution of stride 2, then a norm: `[B, H, W, C]` to `[B, H / 2, W / 2, dim]`."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stem(nn.Module):
    """Images to normalised patches, `[B, H, W, C]` in and out.

    Args:
        in_chans: image channels.
        dim: channels out.
        patch_size: side of disjoint patches, the image filled up with zeros; None for two overlapping 3x3
            convolutions of stride 2.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size or 1
        self.proj = (
            nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
            if patch_size
            else nn.Sequential(
                nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
                nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            )
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(on_nhwc(self.proj, fill_up(x, (self.patch_size, self.patch_size))))


class NAT(Pyramid):
    """NAT, DiNAT, DiNAT_s and their isotropic forms: one network with other sizes.

    Any input size works: odd maps are rounded up, maps smaller than a neighborhood are filled up inside the
    attention.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels of the first stage, doubled from stage to stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        kernel_size: side of the neighborhood.
        dilations: per stage, dilations that its blocks repeat in order (the last ones, where the list is
            longer than the stage); None is 1 everywhere. A name means the official list of that task:
            `"coco"`, `"ade20k"`, `"ade20k_640"` or `"mask2former"`. Weights fit any dilations.
        mlp_ratio: hidden width of the MLP, as a multiple of its channels.
        patch_size: side of disjoint patches with Swin's patch merging between stages (DiNAT_s, isotropic);
            None for overlapping convolutions.
        layer_scale: initial factor per channel of the residual branches, None for none.
        extra_norms: a LayerNorm per returned stage output, as the official dense backbones have.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    undecayed = ("attn.rpb",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: str | Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        patch_size: int | None = None,
        layer_scale: float | None = None,
        extra_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, sum(depths))
        steps = [d for stage in _dilations_of_blocks(dilations, depths) for d in stage]
        settings = iter(zip(steps, rates))
        downsample = PatchMerging if patch_size else ConvDownsample
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads)):
            blocks = []
            for dilation, rate in islice(settings, depth):
                attn = NeighborhoodAttention2d(dim, heads, kernel_size, dilation, **dd)
                blocks.append(Block(dim, attn, mlp_ratio, rate, layer_scale=layer_scale, **dd))
            stages.append(Stage(dim, downsample(dims[i - 1], dim, **dd) if i else nn.Identity(), blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=Stem(in_chans, embed_dim, patch_size, **dd),
            stages=stages,
            norm=nn.LayerNorm(dims[-1], **dd),
            norm_eps=1e-5,
            extra_norms=extra_norms,
            min_size=1,
            reductions=[(patch_size or 4) * 2**i for i in range(len(dims))],
            **dd,
        )


def _dilations_of_blocks(
    dilations: str | Sequence[Sequence[int]] | None, depths: Sequence[int]
) -> list[list[int]]:
    """The dilation of every block of every stage."""
    if isinstance(dilations, str):
        if dilations not in TASK_DILATIONS:
            raise ValueError(f"dilations={dilations!r} is unknown; choose one of {', '.join(TASK_DILATIONS)}")
        dilations = TASK_DILATIONS[dilations]
    dilations = dilations or [(1,)] * len(depths)
    if len(dilations) != len(depths) or not all(map(len, dilations)):
        raise ValueError(
            f"dilations must name at least one for each of {len(depths)} stages, got {dilations}"
        )
    return [list(islice(cycle(steps[-depth:]), depth)) for steps, depth in zip(dilations, depths)]


# The official networks have a stage's downsampling at the end of the stage before; the isotropic ones have
# one list of blocks.
_RULES = (
    ("^patch_embed.", "^stem."),
    (".gamma1$", ".ls1.gamma$"),
    (".gamma2$", ".ls2.gamma$"),
    ("^norm#.", "^extra_norms.#."),
    *CLASSIFIER,
)
_LEVELS, _LAYERS = (
    Names(
        *_RULES,
        *((f"^{top}.{i}.downsample.", f"^stages.{i + 1}.downsample.") for i in range(8)),
        (f"^{top}.#.blocks.", "^stages.#.blocks."),
    )
    for top in ("levels", "layers")
)
_ISOTROPIC_NAMES = Names(*_RULES, ("^layers.#.", "^stages.0.blocks.#."))


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the index that the baseline with full attention stores."""
    return {name: v for name, v in weights.items() if not name.endswith("relative_position_index")}


def _to_official(weights: Weights, model: NAT) -> dict[str, Tensor]:
    """Our weights in the authors' names, with the index of the baseline with full attention."""
    isotropic = len(model.stages) == 1
    patches = isinstance(model.get_submodule("stem.proj"), nn.Conv2d)
    names = _ISOTROPIC_NAMES if isotropic else _LAYERS if patches else _LEVELS
    out = {names.to_official(name): value for name, value in weights.items()}
    for path, attn in model.named_modules():
        # Official neighborhoods are odd; the even ones are the whole map.
        if isinstance(attn, NeighborhoodAttention2d) and attn.kernel_size % 2 == 0:
            index = window_index((attn.kernel_size, attn.kernel_size)).flip(0, 1)
            out[names.to_official(f"{path}.relative_position_index")] = index
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    depths = ours.lengths("stages", "blocks")
    tables = [ours[f"stages.{i}.blocks.0.attn.rpb"] for i in range(len(depths))]
    dim = ours["stages.0.blocks.0.norm1.weight"][0]
    patches, overlapping = ours.get("stem.proj.weight", 4), ours.get("stem.proj.0.weight", 4)
    stem = patches or overlapping
    if stem is None:
        return None
    return {
        "in_chans": stem[1],
        "num_classes": classes_of(ours),
        "embed_dim": dim,
        "depths": depths,
        "num_heads": tuple(table[0] for table in tables),
        "kernel_size": (tables[0][1] + 1) // 2,
        "mlp_ratio": ours["stages.0.blocks.0.mlp.fc1.weight"][0] / dim,
        "patch_size": patches[-1] if patches else None,
        "layer_scale": 1e-5 if "stages.0.blocks.0.ls1.gamma" in ours else None,
        "extra_norms": "extra_norms.0.weight" in ours,
    }


LAYOUT = Layout(
    family="nat",
    model_cls=NAT,
    marks=(r"^stages\.0\.blocks\.0\.attn\.rpb$",),
    rename=(_LEVELS + _LAYERS + _ISOTROPIC_NAMES).to_ours,
    convert=_convert,
    reads={
        "stages.#.blocks.0.attn.rpb": 3,
        "stages.0.blocks.0.norm1.weight": 1,
        "stages.0.blocks.0.mlp.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    unlearned=("dilations",),
)


def _cfg(file: str, top1: float | None, **kwargs: Any) -> dict[str, Any]:
    folder = "nat/checkpoints" if file.startswith("CLS/") else "dinat/checkpoints"
    size = kwargs.get("input_size", (3, 224, 224))[-1]
    return {
        "url": f"https://shi-labs.com/projects/{folder}/{file}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2204.07143" if file.startswith("CLS/") else "arXiv:2209.15001",
        "paper_name": "Neighborhood Attention Transformer"
        if file.startswith("CLS/")
        else "Dilated Neighborhood Attention Transformer",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "notes": (f"ImageNet-1k top-1 {top1}",) if top1 else (),
        **kwargs,
    }


_PATCHES: dict[str, Any] = {"first_conv": "stem.proj"}
_ISOTROPIC: dict[str, Any] = {"first_conv": "stem.proj", "pool_size": (14, 14)}
_384: dict[str, Any] = {"input_size": (3, 384, 384)}
_22K: dict[str, Any] = {"num_classes": 21841}

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg("CLS/nat_mini", 81.8),
        "nat_tiny.in1k": _cfg("CLS/nat_tiny", 83.2),
        "nat_small.in1k": _cfg("CLS/nat_small", 83.7),
        "nat_base.in1k": _cfg("CLS/nat_base", 84.3),
        "dinat_mini.in1k": _cfg("imagenet1k/dinat_mini_in1k_224", 81.8),
        "dinat_tiny.in1k": _cfg("imagenet1k/dinat_tiny_in1k_224", 82.7),
        "dinat_small.in1k": _cfg("imagenet1k/dinat_small_in1k_224", 83.8),
        "dinat_base.in1k": _cfg("imagenet1k/dinat_base_in1k_224", 84.4),
        "dinat_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_224", 86.6),
        "dinat_large.in22k": _cfg("imagenet22k/dinat_large_in22k_224", None, **_22K),
        "dinat_large_384.in22k_ft_in1k": _cfg("imagenet1k/dinat_large_in22k_in1k_384", 87.4, **_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_large_in22k_in1k_384_11x11", 87.5, **_384
        ),
        "dinat_large_384_11x11.in22k": _cfg("imagenet22k/dinat_large_in22k_224_11x11interp", None, **_22K),
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224", 81.8, **_PATCHES),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224", 83.5, **_PATCHES),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224", 83.8, **_PATCHES),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224", 86.5, **_PATCHES),
        "dinat_s_large.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224", None, **_PATCHES, **_22K),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384", 87.4, **_PATCHES, **_384
        ),
        "nat_isotropic_small.in1k": _cfg("isotropic/nat_isotropic_small_in1k_224", 80.0, **_ISOTROPIC),
        "nat_isotropic_base.in1k": _cfg("isotropic/nat_isotropic_base_in1k_224", 81.6, **_ISOTROPIC),
        "dinat_isotropic_small.in1k": _cfg("isotropic/dinat_isotropic_small_in1k_224", 80.8, **_ISOTROPIC),
        "dinat_isotropic_base.in1k": _cfg("isotropic/dinat_isotropic_base_in1k_224", 82.1, **_ISOTROPIC),
        "vitrpb_small.in1k": _cfg("isotropic/vitrpb_small_in1k_224", 81.2, **_ISOTROPIC),
        "vitrpb_base.in1k": _cfg("isotropic/vitrpb_base_in1k_224", 82.5, **_ISOTROPIC),
    }
)


_MINI: dict[str, Any] = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3}
_TINY: dict[str, Any] = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL: dict[str, Any] = {**_TINY, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2}
_BASE: dict[str, Any] = {**_SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "layer_scale": 1e-5}
_LARGE: dict[str, Any] = {**_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
_DILATED: dict[str, Any] = {"dilations": ((1, 8), (1, 4), (1, 2), (1,))}
_DILATED_384: dict[str, Any] = {"dilations": ((1, 13), (1, 6), (1, 3), (1,))}
_S_TINY: dict[str, Any] = {**_DILATED, "patch_size": 4, "mlp_ratio": 4, "depths": (2, 2, 6, 2)}
_S_SMALL: dict[str, Any] = {**_S_TINY, "depths": (2, 2, 18, 2)}
_S_LARGE: dict[str, Any] = {**_S_SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
_ISO_SMALL: dict[str, Any] = {
    "embed_dim": 384,
    "depths": (12,),
    "num_heads": (12,),
    "mlp_ratio": 4,
    "patch_size": 16,
}
_ISO_BASE: dict[str, Any] = {**_ISO_SMALL, "embed_dim": 768, "num_heads": (24,)}

VARIANTS = {
    "nat_mini": Variant("NAT-Mini: 20.0 M parameters, 2.7 GMACs at 224.", **_MINI),
    "nat_tiny": Variant("NAT-Tiny: 27.9 M parameters, 4.3 GMACs at 224.", **_TINY),
    "nat_small": Variant(
        "NAT-Small, with layer scale: 50.7 M parameters, 7.8 GMACs at 224.", **_SMALL, layer_scale=1e-5
    ),
    "nat_base": Variant("NAT-Base: 89.8 M parameters, 13.7 GMACs at 224.", **_BASE),
    "dinat_mini": Variant("DiNAT-Mini: 20.0 M parameters, 2.7 GMACs at 224.", **_MINI, **_DILATED),
    "dinat_tiny": Variant("DiNAT-Tiny: 27.9 M parameters, 4.3 GMACs at 224.", **_TINY, **_DILATED),
    "dinat_small": Variant("DiNAT-Small: 50.7 M parameters, 7.8 GMACs at 224.", **_SMALL, **_DILATED),
    "dinat_base": Variant("DiNAT-Base: 89.8 M parameters, 13.7 GMACs at 224.", **_BASE, **_DILATED),
    "dinat_large": Variant("DiNAT-Large: 200.9 M parameters, 30.6 GMACs at 224.", **_LARGE, **_DILATED),
    "dinat_large_384": Variant(
        "DiNAT-Large with the dilations for 384: 200.9 M parameters, 89.7 GMACs at 384.",
        **_LARGE,
        **_DILATED_384,
    ),
    "dinat_large_384_11x11": Variant(
        "DiNAT-Large with 11x11 neighborhoods: 201.1 M parameters, 92.4 GMACs at 384.",
        **_LARGE,
        **_DILATED,
        kernel_size=11,
    ),
    "dinat_s_tiny": Variant(
        "DiNAT_s-Tiny, the layout of Swin-T: 28.3 M parameters, 4.5 GMACs at 224.",
        **_S_TINY,
        embed_dim=96,
        num_heads=(3, 6, 12, 24),
    ),
    "dinat_s_small": Variant(
        "DiNAT_s-Small: 49.6 M parameters, 8.7 GMACs at 224.",
        **_S_SMALL,
        embed_dim=96,
        num_heads=(3, 6, 12, 24),
    ),
    "dinat_s_base": Variant(
        "DiNAT_s-Base: 87.8 M parameters, 15.4 GMACs at 224.",
        **_S_SMALL,
        embed_dim=128,
        num_heads=(4, 8, 16, 32),
    ),
    "dinat_s_large": Variant("DiNAT_s-Large: 196.5 M parameters, 34.5 GMACs at 224.", **_S_LARGE),
    "dinat_s_large_384": Variant(
        "DiNAT_s-Large with the dilations for 384: 196.5 M parameters, 101.5 GMACs at 384.",
        **(_S_LARGE | _DILATED_384),
    ),
    "nat_isotropic_small": Variant("NAT with one stage of 16x16 patches: 22.0 M parameters.", **_ISO_SMALL),
    "nat_isotropic_base": Variant("NAT with one stage of 16x16 patches: 86.5 M parameters.", **_ISO_BASE),
    "dinat_isotropic_small": Variant(
        "DiNAT with one stage of 16x16 patches: 22.0 M parameters.", **_ISO_SMALL, dilations=((1, 2),)
    ),
    "dinat_isotropic_base": Variant(
        "DiNAT with one stage of 16x16 patches: 86.5 M parameters.", **_ISO_BASE, dilations=((1, 2),)
    ),
    "vitrpb_small": Variant(
        "The ViT baseline: full attention with a relative bias at 224, 14x14 neighborhoods above.",
        **_ISO_SMALL,
        kernel_size=14,
    ),
    "vitrpb_base": Variant(
        "The ViT baseline: full attention with a relative bias at 224, 14x14 neighborhoods above.",
        **_ISO_BASE,
        kernel_size=14,
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
