"""CARE: linear attention, or strip convolutions, beside convolutions on shares of the channels.

Paper: "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction", CVPR
2025, https://arxiv.org/abs/2411.16170. Official code and weights:
https://github.com/zhouyuan888888/CARE-Transformer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.kernels import linear_attention
from visionattn.layers.linear import Linear, activated
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import (
    build_backbone,
    drop_path_rates,
    factory_arguments,
    init_convolution,
    init_linear,
)
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Guess, Shapes
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["CARE"]


class TokenMixer(nn.Module):
    """Three ways to mix pixels, each on a third of the channels; `[B, H, W, 3 * dim]` in and out.

    The first third is mixed globally, by linear attention or by two strip convolutions, the others by
    depthwise 3x3 and 7x7 convolutions.

    Args:
        dim: channels of a third.
        head_dim: width of an attention head; 0 for strip convolutions.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim = head_dim
        if head_dim:
            self.qk = Linear(dim, 2 * dim, **dd)
        else:
            self.dwconvatt_1 = nn.Conv2d(dim, dim, (11, 1), padding=(5, 0), groups=dim, **dd)
            self.dwconvatt_2 = nn.Conv2d(dim, dim, (1, 11), padding=(0, 5), groups=dim, **dd)
        self.dwconv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.dwconv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        far, near, around = x.chunk(3, -1)
        mixed = self.attend(far) if self.head_dim else self._along_strips(far)
        return torch.cat([mixed, on_nhwc(self.dwconv1, near), on_nhwc(self.dwconv2, around)], -1)

    def attend(self, x: Tensor) -> Tensor:
        """Linear attention of `[B, H, W, dim]` whose values are the map itself."""
        q, k = (F.elu(self.qk(x)) + 1).unflatten(-1, (2, -1, self.head_dim)).unbind(3)
        # Sums are means here, which the small number in the denominator is compared with.
        scale = 1 / (x.shape[1] * x.shape[2])
        v = x.to(q.dtype).unflatten(-1, (-1, self.head_dim))
        return linear_attention(q, k, v, scale=scale, eps=1e-6).flatten(3)

    def _along_strips(self, x: Tensor) -> Tensor:
        x = x.contiguous().permute(0, 3, 1, 2)
        return (self.dwconvatt_1(x) + self.dwconvatt_2(x)).permute(0, 2, 3, 1)


class Interaction(nn.Module):
    """An inverted bottleneck with a depthwise convolution in it and a residual around it.

    Args:
        dim: channels.
        ratio: hidden width as a multiple of `dim`.
        expand: end with the hidden features, without a way back and a residual.
    """

    def __init__(
        self,
        dim: int,
        ratio: int,
        expand: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = ratio * dim
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = None if expand else Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to the same shape, or to `[B, H, W, ratio * dim]`."""
        hidden = on_nhwc(self.conv, activated(self.fc1, self.act, on_nhwc(self.norm, x)))
        return hidden if self.fc2 is None else self.fc2(hidden) + x


class CAREBlock(nn.Module):
    """Mix pixels of three quarters of the channels, let channels interact, then those with the last quarter.

    Args:
        dim: channels of a quarter.
        ratios: hidden width of both interactions, as a multiple of their channels.
        head_dim: width of an attention head; 0 for strip convolutions.
        drop_path: stochastic depth.
        expand: return the hidden features of the second interaction, without the residual around the block.
    """

    def __init__(
        self,
        dim: int,
        ratios: Sequence[int],
        head_dim: int,
        drop_path: float = 0.0,
        expand: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.token_mixer = TokenMixer(dim, head_dim, **dd)
        self.inter1 = Interaction(3 * dim, ratios[0], **dd)
        self.inter2 = Interaction(4 * dim, ratios[1], expand, **dd)
        self.gamma = None if expand else nn.Parameter(torch.full((4 * dim,), 1e-6, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, 4 * dim]` to the same shape, or to the hidden features."""
        memory, mixed = x.split([self.dim, 3 * self.dim], -1)
        mixed = self.inter1(self.token_mixer(mixed))
        y = self.inter2(torch.cat([memory, mixed], -1))
        return y if self.gamma is None else x + self.drop_path(self.gamma * y)


class Branch(nn.Module):
    """A classifier of pooled features `[B, C]`, which are activated before the norm."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        drop_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.act(x))))


class Branches(nn.Module):
    """Two classifiers of one form, the second of which learns from a teacher."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        drop_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.own = Branch(dim, num_classes, drop_rate, **dd)
        self.dist = Branch(dim, num_classes, drop_rate, **dd)
        self.apart_in_training = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Pooled features `[B, C]` to the mean of both logits, or to both."""
        own, dist = self.own(x), self.dist(x)
        return (own, dist) if self.training and self.apart_in_training else (own + dist) / 2


class Head(ClassifierHead):
    """Pooling and two classifiers; `[B, C, H, W]` to logits `[B, num_classes]`, in distillation to both."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any):
        super().__init__(dim, 0, global_pool, **dd)
        self.drop_rate = drop_rate
        self.distilled = False
        self._set_branches(num_classes, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, **kwargs: Any) -> None:
        """New classifiers, optionally with another pooling."""
        dd = factory_arguments(self)
        super().reset(0, pool_type, **kwargs)
        self._set_branches(num_classes, **dd)

    def _set_branches(self, num_classes: int, **dd: Any) -> None:
        if num_classes and not self.global_pool.pool_type:
            raise ValueError("global_pool='' goes with num_classes=0: classifiers need pooled features")
        if num_classes:
            self.fc = Branches(self.num_features, num_classes, self.drop_rate, **dd).train(self.training)
            self.fc.apart_in_training = self.distilled
            self.fc.apply(init_linear)


class CARE(Pyramid):
    """CARE: classification networks with two classifiers, of which evaluation takes the mean.

    Any input of at least 32 pixels works; odd rows and columns are left out between stages.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifiers, `"avg"`, `"max"`, `"avgmax"` or `""`.
        depths: blocks per stage.
        embed_dims: channels per stage, multiples of 4.
        ratios: hidden width of both interactions of a block per stage, as a multiple of their channels. The
            last block gives the hidden features of its second one.
        head_dims: width of the attention heads per stage; 0 for strip convolutions in place of attention.
        drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Raises:
        ValueError: widths that quarters and heads do not divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 4, 8, 4),
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        ratios: Sequence[Sequence[int]] = ((2, 2), (2, 4), (4, 4), (4, 4)),
        head_dims: Sequence[int] = (0, 0, 16, 32),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        last = len(depths) - 1
        stages = []
        for i, (dim, head_dim) in enumerate(zip(embed_dims, head_dims)):
            if dim % (4 * max(head_dim, 1)):
                raise ValueError(f"embed_dims must be multiples of 4 * head_dims, got {dim} and {head_dim}")
            blocks = [
                CAREBlock(
                    dim // 4, ratios[i], head_dim, next(rates), expand=(i, j) == (last, depths[i] - 1), **dd
                )
                for j in range(depths[i])
            ]
            down = nn.Identity()
            if i:
                down = MapSequential(
                    nn.BatchNorm2d(embed_dims[i - 1], **dd),
                    nn.Conv2d(embed_dims[i - 1], dim, 2, stride=2, **dd),
                )
            stages.append(Stage(dim * ratios[i][1] if i == last else dim, down, blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=MapSequential(
                nn.Conv2d(in_chans, embed_dims[0], 4, stride=4, **dd), nn.BatchNorm2d(embed_dims[0], **dd)
            ),
            stages=stages,
            norm=nn.Identity(),
            norm_eps=1e-6,
            extra_norms=False,
            min_size=4 * 2**last,
            **dd,
        )
        self.head = Head(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_convolution)

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return the logits of both classifiers, the second of which learns from a teacher."""
        self.head.distilled = enable
        if isinstance(self.head.fc, Branches):
            self.head.fc.apart_in_training = enable


_NAMES = Names(
    (".inter_layer.inter1_", ".inter1."),
    (".inter_layer.inter2_", ".inter2."),
    ("^head.norm.", "^head.fc.own.norm."),
    ("^head.fc.weight$", "^head.fc.own.fc.weight$"),
    ("^head.fc.bias$", "^head.fc.own.fc.bias$"),
    ("^dist_head.", "^head.fc.dist."),
)
# Linear layers that the authors write as 1x1 convolutions.
_LINEAR = re.compile(r"\.(?:qk|inter\d\.fc\d)\.weight$")


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.flatten(1) if v.ndim == 4 and _LINEAR.search(n) else v for n, v in weights.items()}


def _to_official(weights: Weights, model: CARE) -> dict[str, Tensor]:
    """The authors' names and 1x1 convolutions."""
    return _NAMES.official_weights(
        {n: v[..., None, None] if _LINEAR.search(n) else v for n, v in weights.items()}
    )


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any]:
    depths = ours.lengths("stages", "blocks")
    firsts = [f"stages.{i}.blocks.0" for i in range(len(depths))]
    dims = tuple(ours[f"{first}.inter2.fc1.weight"][1] for first in firsts)
    ratios = tuple(
        tuple(ours[f"{first}.inter{k}.fc1.weight"][0] // (dim // 4 * (2 + k)) for k in (1, 2))
        for first, dim in zip(firsts, dims)
    )
    classifier = ours.get("head.fc.own.fc.weight", 2)
    # Heads of 16 channels, in the last stage of 32, as all published networks have them.
    widths = [16] * (len(depths) - 1) + [32]
    attends = [f"{first}.token_mixer.qk.weight" in ours for first in firsts]
    return {
        "in_chans": ours["stem.0.weight"][1],
        "num_classes": classifier[0] if classifier else 0,
        "depths": depths,
        "embed_dims": dims,
        "ratios": ratios,
        "head_dims": Guess(tuple(width if found else 0 for width, found in zip(widths, attends))),
    }


LAYOUT = Layout(
    family="care",
    model_cls=CARE,
    marks=(r"\.token_mixer\.dwconv2\.weight$", r"\.inter2\.fc1\.weight$"),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "stem.0.weight": 4,
        "stages.#.blocks.0.inter1.fc1.weight": 2,
        "stages.#.blocks.0.inter2.fc1.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
)


def _cfg(top1: float) -> dict[str, Any]:
    return {
        # The authors' files lie in a folder of Google Drive that has no address for each.
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": ("head.fc.own.fc", "head.fc.dist.fc"),
        "license": "unknown",
        "paper_ids": "arXiv:2411.16170",
        "paper_name": "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual "
        "Interaction",
        "origin_url": "https://github.com/zhouyuan888888/CARE-Transformer",
        "notes": (f"ImageNet-1k top-1 {top1}",),
    }


default_cfgs = generate_default_cfgs(
    {"care_s0.in1k": _cfg(78.4), "care_s1.in1k": _cfg(80.1), "care_s2.in1k": _cfg(82.1)}
)
VARIANTS = {
    "care_s0": Variant("CARE-S0: 7.3 M parameters, 0.7 GMACs at 224."),
    "care_s1": Variant(
        "CARE-S1: 9.6 M parameters, 1.0 GMACs at 224.",
        depths=(3, 6, 10, 6),
        ratios=((2, 4), (2, 4), (4, 4), (4, 4)),
    ),
    "care_s2": Variant(
        "CARE-S2: 19.5 M parameters, 1.9 GMACs at 224.",
        depths=(3, 6, 10, 6),
        embed_dims=(32, 64, 192, 384),
        ratios=((4, 4),) * 4,
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
