"""HaloNet: residual networks whose spatial layers are attention between blocks and a halo around them.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021,
https://arxiv.org/abs/2103.12731. Its authors published neither code nor weights; parts that the paper leaves
open are those of timm's `halonet_h1`, whose weights load here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from visionattn.layers.linear import NormedLinear
from visionattn.layers.local_attention import HaloAttention2d
from visionattn.layers.maps import on_nhwc
from visionattn.models.frames.common import build_backbone, drop_path_rates
from visionattn.models.frames.pyramid import MapSequential, Pyramid, Stage
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes, classes_of
from visionattn.models.registry.variants import Layout, Variant, Weights, register

__all__ = ["HaloNet"]


class HaloBlock(nn.Module):
    """A bottleneck: linear layer, attention, linear layer, each with a batch norm, and a residual connection.

    Args:
        in_dim: channels in.
        dim: channels of queries and keys.
        value_dim: channels of the values.
        out_dim: channels out.
        num_heads: attention heads.
        block_size: side of a block.
        halo: pixels around it.
        stride: factor by which the map shrinks, in the attention.
        drop_path: stochastic depth.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        value_dim: int,
        out_dim: int,
        num_heads: int,
        block_size: int,
        halo: int,
        stride: int,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stride = stride
        changes = stride > 1 or in_dim != out_dim
        self.shortcut = NormedLinear(in_dim, out_dim, **dd) if changes else nn.Identity()
        self.reduce = NormedLinear(in_dim, dim, **dd)
        self.attn = HaloAttention2d(dim, num_heads, block_size, halo, value_dim, stride, **dd)
        self.norm = nn.BatchNorm2d(value_dim, **dd)
        self.expand = NormedLinear(value_dim, out_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, in_dim]` to `[B, H / stride, W / stride, out_dim]`, rounded up."""
        out = self.attn(F.relu(self.reduce(x)))
        out = self.expand(F.relu(on_nhwc(self.norm, out)))
        shortcut = self.shortcut(x[:, :: self.stride, :: self.stride])
        return F.relu(shortcut + self.drop_path(out))


class FinalLayer(NormedLinear):
    """The layer before the pooling, with a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`."""
        return F.relu(super().forward(x))


class HaloNet(Pyramid):
    """HaloNet, all published sizes.

    Any input size works: maps that blocks do not divide are filled up with zeros inside the attention.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: pooling before the classifier, `"avg"`, `"max"`, `"avgmax"` or `""`.
        embed_dim: channels of the stem and of queries and keys in the first stage, doubled from stage to
            stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        block_size: side of a block of queries.
        halo: pixels by which a block of keys reaches beyond it.
        value_ratio: channels of values, as a multiple of those of queries.
        out_ratio: channels of a stage, as a multiple of those of its queries.
        final_dim: channels of a last layer before the pooling, 0 for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    undecayed = ("height_rel", "width_rel")

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo: int = 3,
        value_ratio: float = 1.0,
        out_ratio: float = 1.0,
        final_dim: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, in_dim = [], embed_dim
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            dim, blocks = embed_dim * 2**i, []
            value_dim, out_dim = int(dim * value_ratio), int(dim * out_ratio)
            for block in range(depth):
                stride = 2 if i and not block else 1
                sizes = in_dim, dim, value_dim, out_dim, heads, block_size, halo
                blocks.append(HaloBlock(*sizes, stride, next(rates), **dd))
                in_dim = out_dim
            stages.append(Stage(in_dim, nn.Identity(), blocks))
        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            stem=MapSequential(
                nn.Conv2d(in_chans, embed_dim, 7, stride=2, padding=3, bias=False, **dd),
                nn.BatchNorm2d(embed_dim, **dd),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            ),
            stages=stages,
            norm=FinalLayer(in_dim, final_dim, **dd) if final_dim else nn.Identity(),
            norm_eps=1e-5,
            extra_norms=False,
            min_size=1,
            num_features=final_dim or None,
            **dd,
        )


# timm's names: the authors published none.
_NAMES = Names(
    ("^stem.conv1.conv.", "^stem.0."),
    ("^stem.conv1.bn.", "^stem.1."),
    ("^stages.#.#.shortcut.conv.", "^stages.#.blocks.#.shortcut.linear."),
    ("^stages.#.#.shortcut.bn.", "^stages.#.blocks.#.shortcut.norm."),
    ("^stages.#.#.conv1_1x1.conv.", "^stages.#.blocks.#.reduce.linear."),
    ("^stages.#.#.conv1_1x1.bn.", "^stages.#.blocks.#.reduce.norm."),
    ("^stages.#.#.self_attn.pos_embed.", "^stages.#.blocks.#.attn."),
    ("^stages.#.#.self_attn.", "^stages.#.blocks.#.attn."),
    ("^stages.#.#.post_attn.", "^stages.#.blocks.#.norm."),
    ("^stages.#.#.conv3_1x1.conv.", "^stages.#.blocks.#.expand.linear."),
    ("^stages.#.#.conv3_1x1.bn.", "^stages.#.blocks.#.expand.norm."),
    ("^final_conv.conv.", "^norm.linear."),
    ("^final_conv.bn.", "^norm.norm."),
)


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """1x1 convolutions become linear layers."""
    return {n: v.flatten(1) if v.ndim == 4 and v.shape[2:] == (1, 1) else v for n, v in weights.items()}


def _to_official(weights: Weights, model: HaloNet) -> dict[str, Tensor]:
    """Our weights in timm's names and shapes."""
    return {
        _NAMES.to_official(n): v[..., None, None]
        if n.endswith((".linear.weight", ".q.weight", ".kv.weight"))
        else v
        for n, v in weights.items()
    }


def _arguments(ours: Shapes, official: Shapes) -> dict[str, Any] | None:
    first = "stages.0.blocks.0"
    dim = ours[f"{first}.attn.q.weight"][0]
    depths = ours.lengths("stages", "blocks")
    final = ours.get("norm.linear.weight", 2)
    return {
        "in_chans": ours["stem.0.weight"][1],
        "num_classes": classes_of(ours),
        "embed_dim": dim,
        "depths": depths,
        "num_heads": tuple(
            dim * 2**i // ours[f"stages.{i}.blocks.0.attn.height_rel"][1] for i in range(len(depths))
        ),
        "value_ratio": ours[f"{first}.attn.kv.weight"][0] / dim - 1,
        "out_ratio": ours[f"{first}.expand.linear.weight"][0] / dim,
        "final_dim": final[0] if final else 0,
    }


LAYOUT = Layout(
    family="halonet",
    model_cls=HaloNet,
    marks=(r"^stages\.0\.blocks\.0\.attn\.height_rel$", r"^stages\.0\.blocks\.0\.reduce\.linear\.weight$"),
    rename=_NAMES.to_ours,
    convert=_convert,
    reads={
        "stem.0.weight": 4,
        "stages.#.blocks.0.attn.height_rel": 2,
        "stages.0.blocks.0.attn.q.weight": 2,
        "stages.0.blocks.0.attn.kv.weight": 2,
        "stages.0.blocks.0.expand.linear.weight": 2,
    },
    arguments=_arguments,
    to_official=_to_official,
    unlearned=("block_size", "halo"),
)


def _cfg(size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "crop_pct": 0.875 if size == 256 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2103.12731",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "origin_url": "https://arxiv.org/abs/2103.12731",
    }


_SIZES = {"h0": 256, "h2": 256, "h3": 320, "h4": 384, "h5": 448, "h6": 512, "h7": 600}
default_cfgs = generate_default_cfgs({f"halonet_{name}": _cfg(size) for name, size in _SIZES.items()})

# H1 is timm's.
VARIANTS = {
    "halonet_h0": Variant(
        "HaloNet-H0: 5.5 M parameters, 2.3 GMACs at 256.", depths=(3, 3, 7, 3), out_ratio=0.5
    ),
    "halonet_h2": Variant(
        "HaloNet-H2: 9.4 M parameters, 3.3 GMACs at 256.", depths=(3, 3, 11, 3), out_ratio=1.25
    ),
    "halonet_h3": Variant(
        "HaloNet-H3: 11.8 M parameters, 6.1 GMACs at 320.",
        depths=(3, 3, 12, 3),
        out_ratio=1.5,
        block_size=10,
        final_dim=1024,
    ),
    "halonet_h4": Variant(
        "HaloNet-H4: 19.1 M parameters, 11.9 GMACs at 384.",
        depths=(3, 3, 12, 3),
        out_ratio=3.0,
        block_size=12,
        halo=2,
        final_dim=1280,
    ),
    "halonet_h5": Variant(
        "HaloNet-H5: 30.7 M parameters, for 448.",
        depths=(3, 3, 23, 3),
        value_ratio=2.5,
        out_ratio=2.0,
        block_size=14,
        halo=2,
        final_dim=1536,
    ),
    "halonet_h6": Variant(
        "HaloNet-H6: 43.5 M parameters, for 512.",
        depths=(3, 3, 24, 3),
        value_ratio=3.0,
        out_ratio=2.75,
        block_size=8,
        halo=4,
        final_dim=1536,
    ),
    "halonet_h7": Variant(
        "HaloNet-H7: 67.4 M parameters, for 600.",
        depths=(3, 3, 26, 3),
        value_ratio=4.0,
        out_ratio=3.5,
        block_size=10,
        final_dim=2048,
    ),
}
register(__name__, LAYOUT, VARIANTS, builder=build_backbone)
