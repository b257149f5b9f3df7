"""OverLoCK: an overview of the image first, then a closer look under its guidance, in convolutions alone.

Paper: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", CVPR 2025,
https://arxiv.org/abs/2502.20087. Official code and weights: https://github.com/LMMMEng/OverLoCK (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers.context_mixing import (
    ChannelScale,
    ContextMixingBlock,
    LargeConv2d,
    StaticBlock,
    resize,
)
from visionattn.layers.linear import Linear, NormedLinear
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import Supervised, build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["OverLoCK"]


class Overview(NamedTuple):
    """What the focus stages hand on.

    Attributes:
        map: features and, behind them, their context, `[B, H, W, C + Cc]`.
        reference: the context as the overview gave it, `[B, H', W', Cc]`.
        overview: the last map of the overview, `[B, H', W', Co]`.
    """

    map: Tensor
    reference: Tensor
    overview: Tensor


class FocusStage(Stage):
    """Dynamic blocks under the guidance of an overview; base of the two focus stages."""

    def focus(self, x: Tensor, reference: Tensor) -> Tensor:
        """`[B, H, W, C + Cc]` to the same."""
        recompute = self.grad_checkpointing and self.training
        for block in self.blocks:
            x = checkpoint(block, x, reference) if recompute else block(x, reference)
        return x


class FirstFocus(FocusStage):
    """The third stage: static blocks, from them an overview, and with it dynamic blocks.

    Args:
        dim: channels out, features and context.
        downsample: from the second stage.
        base: the static blocks.
        overview: the stage that looks at the whole.
        context: the overview's map to a context.
        blocks: the dynamic blocks.
    """

    def __init__(
        self,
        dim: int,
        downsample: nn.Module,
        base: Sequence[nn.Module],
        overview: Stage,
        context: nn.Module,
        blocks: Sequence[nn.Module],
    ):
        super().__init__(dim, downsample, blocks)
        self.base = Stage(dim, nn.Identity(), base)
        self.overview = overview
        self.context = context

    def forward(self, x: Tensor) -> Overview:  # type: ignore[override]
        """`[B, H, W, C]` of the second stage to half its size."""
        x = self.base(self.downsample(x))
        overview = self.overview(x)
        context = self.context(overview)
        reference = resize(context, (x.shape[1], x.shape[2]))
        return Overview(self.focus(torch.cat([x, reference], -1), reference), context, overview)


class SplitDownsample(nn.Module):
    """Features and context, downsampled each by itself."""

    def __init__(self, dims: tuple[int, int], context_dim: int, dd: dict[str, Any]):
        super().__init__()
        self.sizes = dims[0], context_dim
        self.features = _downsample(*dims, dd)
        self.context = _downsample(context_dim, context_dim, dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C + Cc]` to half its size."""
        features, context = x.split(self.sizes, -1)
        return torch.cat([self.features(features), self.context(context)], -1)


class SecondFocus(FocusStage):
    """The last stage: features and context downsampled each by itself, then dynamic blocks."""

    def forward(self, x: Overview) -> Overview:  # type: ignore[override]
        """Half the size of the map; the overview stays."""
        return x._replace(map=self.focus(self.downsample(x.map), x.reference))


class Projection(NormedLinear):
    """The layer before the pooling, with a SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`."""
        return F.silu(super().forward(x))


class AuxiliaryHead(nn.Module):
    """A classifier of the overview `[B, H, W, C]` for training."""

    def __init__(self, dim: int, num_classes: int, dd: dict[str, Any]):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.fc = Linear(dim, num_classes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, num_classes]`."""
        return self.fc(on_nhwc(self.norm, x).mean((1, 2)))


class OverLoCK(Pyramid):
    """OverLoCK, all official forms.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: static blocks of both first stages, of the base and of the overview.
        sub_depths: dynamic blocks of the third and the last stage.
        embed_dims: channels of both first stages, of the base and of the overview.
        sub_num_heads: half of the groups of channels in the dynamic blocks, for both stages.
        kernel_sizes: side of the large convolutions, as `depths`; those of the last two are the large
            dynamic kernels too.
        small_kernel: side of the small dynamic kernel.
        mlp_ratio: hidden width of the MLP in static blocks, as a multiple of their channels.
        sub_mlp_ratio: the same of dynamic blocks, as a multiple of the channels without the context.
        projection: channels before the classifier.
        merged: whether large convolutions are merged from the start: the form for deployment.
        aux_head: whether training classifies the overview too; the output is then a `Supervised`.
        extra_norms: a LayerNorm per returned stage output, as the official dense backbones have.
        overview_output: whether the last of these outputs has the overview added, as for detection.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    undecayed = ("rpb1", "rpb2")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 3, 2),
        sub_depths: Sequence[int] = (6, 2),
        embed_dims: Sequence[int] = (56, 112, 256, 336),
        sub_num_heads: Sequence[int] = (4, 6),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        small_kernel: int = 5,
        mlp_ratio: float = 4.0,
        sub_mlp_ratio: float = 3.0,
        projection: int = 1024,
        merged: bool = False,
        aux_head: bool = False,
        extra_norms: bool = False,
        overview_output: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims, context = tuple(embed_dims), embed_dims[3] // 4
        if overview_output and not extra_norms:
            raise ValueError("overview_output=True needs extra_norms=True")
        rates = iter(drop_path_rates(drop_path_rate, sum(depths) + sum(sub_depths)))

        def static(i: int) -> list[nn.Module]:
            settings = dims[i], kernel_sizes[i], mlp_ratio, i > 1, merged
            return [StaticBlock(*settings, next(rates), **dd) for _ in range(depths[i])]

        def dynamic(i: int) -> list[nn.Module]:
            kernels = kernel_sizes[2 + i], small_kernel
            settings = dims[2 + i], sub_num_heads[i], context, *kernels, sub_mlp_ratio
            return [
                ContextMixingBlock(*settings, bool(i or block), merged, next(rates), **dd)
                for block in range(sub_depths[i])
            ]

        first = [Stage(dims[0], nn.Identity(), static(0))]
        first.append(Stage(dims[1], _downsample(dims[0], dims[1], dd), static(1)))
        base, overview = static(2), Stage(dims[3], _downsample(dims[2], dims[3], dd), static(3))
        focus = FirstFocus(
            dims[2] + context,
            _downsample(dims[1], dims[2], dd),
            base,
            overview,
            Linear(dims[3], context, **dd),
            dynamic(0),
        )
        down = SplitDownsample((dims[2], dims[3]), context, dd)
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=_stem(in_chans, dims[0], dd),
            stages=[*first, focus, SecondFocus(dims[3] + context, down, dynamic(1))],
            norm=Projection(dims[3] + context, projection, **dd),
            norm_eps=1e-6,
            extra_norms=extra_norms,
            min_size=1,
            num_features=projection,
            **dd,
        )
        has_aux, self.overview_dim = aux_head and num_classes > 0, dims[3]
        self.aux_head = AuxiliaryHead(dims[3], num_classes, dd) if has_aux else nn.Identity()
        self.overview_norm = self.overview_proj = self.overview_scale = None
        if overview_output:
            self.overview_norm = nn.LayerNorm(dims[3], eps=1e-6, **dd)
            self.overview_proj = Linear(dims[3], dims[3] + context, **dd)
            self.overview_scale = ChannelScale(dims[3] + context, 1e-5, **dd)
        self.apply(_init_convolution)

    def map_of(self, x: Tensor | Overview) -> Tensor:
        """The map `[B, H, W, C]` in what a stage returns; context stands behind the features."""
        return x.map if isinstance(x, Overview) else x

    def extra_norm(self, level: int, x: Tensor, state: Any) -> Tensor:
        """The extra norm of a level; of the last one perhaps with the overview."""
        x = super().extra_norm(level, x, state)
        if level < 3 or self.overview_norm is None:
            return x
        assert self.overview_proj is not None
        assert self.overview_scale is not None
        return x + self.overview_scale(self.overview_proj(self.overview_norm(state.overview)))

    def reparameterize(self) -> None:
        """Merge every large convolution for good: the same outputs, and no training as before."""
        for module in self.modules():
            if isinstance(module, LargeConv2d):
                module.reparameterize()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0: none), optionally with another pooling."""
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.aux_head, AuxiliaryHead):
            like = self.aux_head.fc.weight
            dd: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            self.aux_head = (
                AuxiliaryHead(self.overview_dim, num_classes, dd) if num_classes else nn.Identity()
            )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers for layer-wise decay.

        Base and overview count as layers beside the dynamic blocks of their stage.
        """
        groups = super().group_matcher(coarse)
        last = r"^(?:norm|extra_norms|overview_\w+|aux_head)"
        if coarse:
            return {**groups, "blocks": [(groups["blocks"], None), (last, (99999,))]}
        fine = [
            (r"^stages\.(\d+)\.(?:downsample|context|overview\.downsample)", (0,)),
            (r"^stages\.(\d+)\.(?:base\.|overview\.)?blocks\.(\d+)", None),
            (last, (99999,)),
        ]
        return {**groups, "blocks": fine}

    def forward(self, x: Tensor) -> Tensor | Supervised:  # type: ignore[override]
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`; see `aux_head` for training."""
        if not (self.training and isinstance(self.aux_head, AuxiliaryHead)):
            return super().forward(x)
        state = self.stages(self.embed(x))
        main = self.forward_head(self.final_norm(state.map).permute(0, 3, 1, 2))
        return Supervised(main, self.aux_head(state.overview), 0.4)


def _stem(in_chans: int, dim: int, dd: dict[str, Any]) -> MapSequential:
    layers: list[nn.Module] = []
    for i, (wide, stride) in enumerate(((dim // 2, 2), (dim // 2, 1), (dim, 2), (dim, 1))):
        channels = in_chans if i == 0 else dim // 2 if i < 3 else dim
        layers += [nn.Conv2d(channels, wide, 3, stride, 1, bias=False, **dd), nn.BatchNorm2d(wide, **dd)]
        layers += [nn.GELU()] if i < 3 else []
    return MapSequential(*layers)


def _downsample(in_dim: int, dim: int, dd: dict[str, Any]) -> MapSequential:
    conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
    return MapSequential(conv, nn.BatchNorm2d(dim, **dd))


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# The parts of both blocks, numbered by the authors.
_STATIC = (
    "proj.0 norm, proj.1 large, proj.2 large_norm, proj.3.proj.1 se.fc1, proj.3.proj.3 se.fc2, "
    "proj.4 mlp.fc1, proj.6 mlp.dwconv, proj.7 mlp.grn, proj.8 mlp.fc2"
)
_DYNAMIC = (
    "proj.0 out_norm, proj.1 out, mlp.0 mlp.fc1, mlp.2 mlp.dwconv, mlp.3 mlp.grn, mlp.4 mlp.fc2, "
    "fusion.0 fusion.dwconv, fusion.1 fusion.norm, fusion.3 fusion.linear, fusion.4 fusion.grn, "
    "weight_query.0 query.linear, weight_query.1 query.norm, weight_key.1 key.linear, weight_key.2 key.norm, "
    "gate.0 gate.linear, gate.1 gate.norm, dyconv_proj.0 mix.linear, dyconv_proj.1 mix.norm, lepe.0 large, "
    "lepe.1 large_norm, se_layer.proj.1 se.fc1, se_layer.proj.3 se.fc2"
)
_NETWORK = (
    "patch_embed1 stem, patch_embed2 stages.1.downsample, patch_embed3 stages.2.downsample, "
    "patch_embed4 stages.2.overview.downsample, patch_embedx.x_proj stages.3.downsample.features, "
    "patch_embedx.h_proj stages.3.downsample.context, blocks1 stages.0.blocks, blocks2 stages.1.blocks, "
    "blocks3 stages.2.base.blocks, blocks4 stages.2.overview.blocks, sub_blocks3 stages.2.blocks, "
    "sub_blocks4 stages.3.blocks, high_level_proj stages.2.context, head.0 norm.linear, head.1 norm.norm, "
    "head.4 head.fc, aux_head.0 aux_head.norm, aux_head.2 aux_head.fc, extra_norm.4 overview_norm, "
    "extra_norm extra_norms, h_proj.0 overview_proj, h_proj.1 overview_scale"
)


def _rules(where: str, pairs: str) -> list[tuple[str, str]]:
    names = (pair.split(" ") for pair in pairs.split(", "))
    return [(f"{where}{theirs}.", f"{where}{ours}.") for theirs, ours in names]


_NAMES = Names(*_rules("^sub_blocks#.#.", _DYNAMIC), *_rules("^blocks#.#.", _STATIC), *_rules("^", _NETWORK))
_SCALES = re.compile(r"\.(?:ls|ls1|ls2|x_scale|h_scale)\.weight$|^overview_scale\.weight$|\.(?:gamma|beta)$")


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """1x1 convolutions become linear layers, scales and norms over channels lose their empty axes."""
    out = {}
    for name, value in weights.items():
        if value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value.flatten() if _SCALES.search(name) else value.flatten(1)
        out[name] = value
    return out


def _fit(weights: dict[str, Tensor], model: OverLoCK) -> dict[str, Tensor]:
    """Merge the branches of large convolutions that the network has merged."""
    out = dict(weights)
    for path, module in model.named_modules():
        prefix = f"{path}.lk_origin."
        if not isinstance(module, LargeConv2d) or module.branches or f"{prefix}weight" not in weights:
            continue
        inside = {n: out.pop(n) for n in list(out) if n.startswith(f"{path}.")}
        if f"{prefix}bias" not in inside:
            weight = inside[f"{prefix}weight"]
            whole = LargeConv2d(len(weight), weight.shape[-1], device=weight.device, dtype=weight.dtype)
            whole.load_state_dict({n.removeprefix(f"{path}."): v for n, v in inside.items()})
            whole.reparameterize()
            inside = {f"{path}.{n}": v.detach() for n, v in whole.state_dict().items()}
        out.update(inside)
    return out


def _to_official(weights: Weights, model: OverLoCK) -> dict[str, Tensor]:
    """Our weights in the authors' names and shapes."""
    modules, out = dict(model.named_modules()), {}
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        if last in ("gamma", "beta"):
            value = value[None, :, None, None]
        elif last == "weight" and isinstance(modules.get(path), ChannelScale):
            value = value[:, None, None, None]
        elif last == "weight" and isinstance(modules.get(path), nn.Linear):
            value = value[..., None, None]
        out[_NAMES.to_official(name)] = value
    return out


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    blocks = ("stages.0.blocks", "stages.1.blocks", "stages.2.base.blocks", "stages.2.overview.blocks")
    focus = ("stages.2.blocks", "stages.3.blocks")
    kernels = [ours[f"{path}.0.large.lk_origin.weight"][-1] for path in blocks]
    dims = [ours[f"{path}.0.norm.weight"][0] for path in blocks]
    groups, small, _ = ours["stages.2.blocks.0.rpb1"]
    out = {
        "in_chans": ours["stem.0.weight"][1],
        "num_classes": classes_of(ours),
        "depths": tuple(ours.length(path) for path in blocks),
        "sub_depths": tuple(ours.length(path) for path in focus),
        "embed_dims": tuple(dims),
        "sub_num_heads": (groups // 2, ours["stages.3.blocks.0.rpb1"][0] // 2),
        "kernel_sizes": tuple(kernels),
        "small_kernel": (small + 1) // 2,
        "mlp_ratio": ours["stages.0.blocks.0.mlp.fc1.weight"][0] / dims[0],
        "sub_mlp_ratio": ours["stages.2.blocks.0.mlp.fc1.weight"][0] / dims[2],
        "merged": "stages.0.blocks.0.large.lk_origin.bias" in ours,
        "extra_norms": "extra_norms.0.weight" in ours,
        "overview_output": "overview_norm.weight" in ours,
        "aux_head": "aux_head.fc.weight" in ours,
    }
    projection = ours.get("norm.linear.weight", 2)
    return {**out, "projection": projection[0]} if projection else out


LAYOUT = Layout(
    family="overlock",
    model_cls=OverLoCK,
    marks=(r"^stages\.2\.overview\.blocks\.0\.large\.lk_origin\.weight$", r"^stages\.3\.blocks\.0\.rpb2$"),
    rename=_NAMES.to_ours,
    convert=_convert,
    fit=_fit,
    reads={
        "stem.0.weight": 4,
        **{f"stages.{part}.0.norm.weight": 1 for part in ("0.blocks", "1.blocks", "2.base.blocks")},
        "stages.2.overview.blocks.0.norm.weight": 1,
        **{
            f"stages.{part}.0.large.lk_origin.weight": 4 for part in ("0.blocks", "1.blocks", "2.base.blocks")
        },
        "stages.2.overview.blocks.0.large.lk_origin.weight": 4,
        **{f"stages.{i}.blocks.0.rpb1": 3 for i in (2, 3)},
        **{f"stages.{i}.blocks.0.mlp.fc1.weight": 2 for i in (0, 2)},
    },
    arguments=_arguments,
    to_official=_to_official,
    training=("aux_head",),
)


_PAPER = "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels"


def _cfg(name: str, top1: float, crop_pct: float) -> dict[str, Any]:
    return {
        "url": f"https://github.com/LMMMEng/OverLoCK/releases/download/v1/{name}_in1k_224.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2502.20087",
        "paper_name": _PAPER,
        "origin_url": "https://github.com/LMMMEng/OverLoCK",
        "notes": (f"ImageNet-1k top-1 {top1}",),
    }


default_cfgs = generate_default_cfgs(
    {
        "overlock_xt.in1k": _cfg("overlock_xt", 82.7, 0.925),
        "overlock_t.in1k": _cfg("overlock_t", 84.2, 0.95),
        "overlock_s.in1k": _cfg("overlock_s", 84.8, 0.95),
        "overlock_b.in1k": _cfg("overlock_b", 85.1, 0.975),
    }
)

VARIANTS = {
    "overlock_xt": Variant("OverLoCK-XT: 16.4 M parameters when merged, 2.6 GMACs at 224."),
    "overlock_t": Variant(
        "OverLoCK-T: 33.5 M parameters when merged, 5.5 GMACs at 224.",
        depths=(4, 4, 6, 2),
        sub_depths=(12, 2),
        embed_dims=(64, 128, 256, 512),
        sub_num_heads=(4, 8),
    ),
    "overlock_s": Variant(
        "OverLoCK-S: 56.2 M parameters when merged, 9.7 GMACs at 224.",
        depths=(6, 6, 8, 3),
        sub_depths=(16, 3),
        embed_dims=(64, 128, 320, 512),
        sub_num_heads=(8, 16),
    ),
    "overlock_b": Variant(
        "OverLoCK-B: 94.9 M parameters when merged, 16.7 GMACs at 224.",
        depths=(8, 8, 10, 4),
        sub_depths=(20, 4),
        embed_dims=(80, 160, 384, 576),
        sub_num_heads=(6, 9),
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
